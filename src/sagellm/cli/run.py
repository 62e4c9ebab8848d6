"""``sage-llm run``: a model in this process, answering in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sagellm import store
from sagellm.cli import engine_flags as flags
from sagellm.cli.common import human_bytes, print_json, single
from sagellm_protocol.errors import InvalidArgumentError

# A small model that is told what it is answers in the language that it is asked in.
DEFAULT_SYSTEM = "You are a helpful AI assistant."
_ANSWER = "Answer"


def run(
    model: Annotated[str, typer.Argument(help="A name (smollm2:135m) or a path (./model.gguf).")] = "",
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask; without it a conversation starts, or standard input is the prompt."),
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Append standard input to the prompt.")] = False,
    system: Annotated[str, typer.Option(help="System message; empty for the template's own.")] = DEFAULT_SYSTEM,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=2.0, help="0 is greedy [what the model's makers recommend].", rich_help_panel=_ANSWER
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of the probability to draw from.", rich_help_panel=_ANSWER)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from that many most likely tokens.", rich_help_panel=_ANSWER)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer.", rich_help_panel=_ANSWER)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=_ANSWER)] = 1024,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="json, or a file with a JSON schema to keep to.", rich_help_panel=_ANSWER),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Do not render Markdown.", rich_help_panel=_ANSWER)] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole reply as JSON.", rich_help_panel=_ANSWER)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Report times, rates and memory at the end.")
    ] = False,
    mock: flags.Mock = False,
    ctx: flags.Ctx = None,
    parallel: flags.Parallel = None,
    memory: flags.Memory = None,
    backend: flags.Backend = None,
    threads: flags.Threads = None,
    quant: flags.Quant = None,
    kv_dtype: flags.KvDtype = None,
    spec: flags.Spec = None,
    draft_model: flags.DraftModel = None,
    lora: flags.Lora = None,
    mock_scale: flags.MockSpeed = None,
    script: flags.Script = None,
) -> None:
    """Chat with a model, or answer one prompt."""
    if mock and prompt is None and not _names_a_model(model):
        model, prompt = "mock", model or None  # `run --mock "hello"`: the only word is the prompt
    if not model:
        raise typer.BadParameter(
            "name a model, such as smollm2:135m (sage-llm list shows what is here)", param_hint="MODEL"
        )
    flags.ensure_model(model)
    if model != "mock" and (stored := store.resolve(model)).kind == "embedding":
        raise InvalidArgumentError(
            f"{stored.name} gives vectors, not text: serve it (sage-llm serve {model}) and ask /v1/embeddings",
            param="model",
        )
    changes = flags.engine_changes(
        ctx=ctx,
        parallel=parallel,
        memory=memory,
        model=model,
        mock=mock,
        backend=backend,
        threads=threads,
        quant=quant,
        kv_dtype=kv_dtype,
        spec=spec,
        draft_model=draft_model,
        lora=lora,
        mock_scale=mock_scale,
        script=script,
    )
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "max_tokens": max_tokens}
    options: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    if format_ is not None:
        from sagellm.cli.session import response_format

        options["response_format"] = response_format(format_)
    prompt = _with_stdin(prompt, stdin)
    if prompt is None and as_json:
        raise InvalidArgumentError("--json prints one reply: give a prompt, or pipe it in", param="json")
    _converse(model, changes, system, prompt, options, verbose=verbose, plain=plain, as_json=as_json)


def _names_a_model(text: str) -> bool:
    return bool(text) and (text == "mock" or store.layout.looks_like_path(text) or " " not in text)


def _with_stdin(prompt: str | None, append: bool) -> str | None:
    """Return the prompt, or None for a conversation on a terminal.

    Raises:
        InvalidArgumentError: there is nothing to ask.
    """
    if append:
        prompt = f"{prompt or ''}\n\n{sys.stdin.read()}".strip()
    elif prompt is None:
        if sys.stdin.isatty():
            return None
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise InvalidArgumentError(
            'the prompt is empty: sage-llm run MODEL "your question", or pipe it in', param="prompt"
        )
    return prompt


def _converse(
    model: str,
    changes: dict[str, Any],
    system: str,
    prompt: str | None,
    options: dict[str, Any],
    *,
    verbose: bool,
    plain: bool,
    as_json: bool,
) -> None:
    from sagellm.cli.session import Session
    from sagellm.client import UnifiedInferenceClient

    with UnifiedInferenceClient.create(default_llm_model=model, embedded=True, engine=changes, timeout=None) as client:
        client.models()  # loads the engine: what follows is measured without that

        def switch(name: str) -> str:
            flags.ensure_model(name)
            client.ensure_model(name)
            return name

        session = Session(client.default_llm_model or model, switch, system=system, options=options)
        markdown = not plain and sys.stdout.isatty() and "response_format" not in options
        if prompt is None:
            from sagellm.cli.repl import talk

            talk(client, session, verbose=verbose, markdown=markdown)
        elif as_json:
            print_json(dict(client.chat(session.ask(prompt), model=session.model, **options)))
        else:
            _once(client, session, prompt, verbose=verbose, markdown=markdown)


def _once(client: Any, session: Any, prompt: str, *, verbose: bool, markdown: bool) -> None:
    from sagellm.cli.markdown import Renderer
    from sagellm.cli.meter import Meter

    meter, renderer = Meter(), Renderer(colour=markdown)
    messages = session.ask(prompt)
    for delta in client.chat(
        messages, model=session.model, stream=True, stream_options={"include_usage": True}, **session.options
    ):
        meter.saw(delta)
        sys.stdout.write(renderer.push(delta.text))
        sys.stdout.flush()
    sys.stdout.write(renderer.finish() + "\n")
    if verbose:
        sys.stderr.write(meter.report(human_bytes) + "\n")


app = single(run)
