"""What goes over HTTP to OpenAI-compatible servers and what comes back; pure translation, no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import (
    EngineDiedError,
    InvalidArgumentError,
    ModelNotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    SageError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.generation import ChatMessage, FinishReason, GenerationRequest, ToolCallDelta, Usage
from sagellm_protocol.sampling import SamplingParams

__all__ = ["Flavour", "StreamReader", "error_of_status", "parse_load", "request_body"]

Flavour = Literal["openai", "vllm", "sglang", "llamacpp", "ollama"]

#: Sampling fields beyond OpenAI's own, by the servers that understand them.
_EXTRA_SAMPLING: dict[str, dict[str, str]] = {
    "openai": {},
    "vllm": {
        "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "min_tokens": "min_tokens",
        "ignore_eos": "ignore_eos", "stop_token_ids": "stop_token_ids", "bad_words": "bad_words",
        "allowed_token_ids": "allowed_token_ids",
    },
    "sglang": {
        "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "min_tokens": "min_tokens",
        "ignore_eos": "ignore_eos", "stop_token_ids": "stop_token_ids",
    },
    "llamacpp": {
        "top_k": "top_k", "min_p": "min_p", "typical_p": "typical_p", "repetition_penalty": "repeat_penalty",
        "ignore_eos": "ignore_eos",
    },
    "ollama": {},
}  # fmt: skip

_OPENAI_SAMPLING = frozenset(
    ("temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "stop")
)


def request_body(request: EngineRequest, model: str, flavour: Flavour) -> tuple[str, dict[str, Any]]:
    """Return the path and the JSON body of a streamed request.

    Raises:
        UnsupportedError: something that this server cannot do, by name.
    """
    source = request.source
    if source is None:
        raise UnsupportedError("an engine over HTTP needs the request as text", param="prompt")
    body = _sampling(request.sampling, flavour)
    body["model"], body["stream"], body["stream_options"] = model, True, {"include_usage": True}
    if request.adapter is not None:
        raise UnsupportedError("adapter is not supported by an engine over HTTP: name it as the model", param="adapter")
    if source.messages is None:
        return "/completions", body | _completion(source, request.emitted_text)
    if source.reasoning is not None:
        body["chat_template_kwargs"] = {"enable_thinking": source.reasoning}
    return "/chat/completions", body | _chat(source, request.emitted_text)


def _completion(source: GenerationRequest, emitted: str) -> dict[str, Any]:
    suffix = {"suffix": source.suffix} if source.suffix else {}
    if isinstance(source.prompt, str):
        return {"prompt": source.prompt + emitted, **suffix}
    return {"prompt": list(source.prompt or ()), **suffix}


def _chat(source: GenerationRequest, emitted: str) -> dict[str, Any]:
    messages = [_message(message) for message in source.messages or ()]
    body: dict[str, Any] = {"messages": messages}
    if emitted:
        # vLLM and SGLang go on with an assistant message that is not finished.
        messages.append({"role": "assistant", "content": emitted})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if source.tools:
        body["tools"] = [{"type": "function", "function": msgspec.to_builtins(tool)} for tool in source.tools]
        choice = source.tool_choice
        plain = choice in ("auto", "none", "required")
        body["tool_choice"] = choice if plain else {"type": "function", "function": {"name": choice}}
        body["parallel_tool_calls"] = source.parallel_tool_calls
    return body


def _message(message: ChatMessage) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": call.id, "type": "function", "function": msgspec.to_builtins(call.function)}
            for call in message.tool_calls
        ]
    return out


def _sampling(sampling: SamplingParams, flavour: Flavour) -> dict[str, Any]:
    body: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    known = _EXTRA_SAMPLING[flavour]
    for name, value in msgspec.to_builtins(sampling).items():  # what is not as it is by default
        if name in _OPENAI_SAMPLING:
            body[name] = value
        elif name in known:
            body[known[name]] = value
        elif name == "logit_bias":
            body[name] = {str(token): bias for token, bias in value.items()}
        elif name == "grammar":
            body["response_format"] = _response_format(sampling)
        elif name in ("logprobs", "prompt_logprobs"):
            raise UnsupportedError(
                "logprobs are not supported by an engine over HTTP: it gives no token ids", param="logprobs"
            )
        else:
            raise UnsupportedError(f"{name} is not supported by an engine of kind {flavour!r}", param=name)
    return body


def _response_format(sampling: SamplingParams) -> dict[str, Any]:
    grammar = sampling.grammar
    assert grammar is not None
    if grammar.kind == "json_object":
        return {"type": "json_object"}
    if grammar.kind == "json_schema":
        schema = msgspec.json.decode(grammar.source)
        return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}
    raise UnsupportedError(
        f"a grammar of kind {grammar.kind!r} is not supported by an engine over HTTP", param="grammar"
    )


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_CHUNKS = msgspec.json.Decoder(list[_Chunk])

MAX_LINE_BYTES = 16 * 2**20
_DONE = b"data: [DONE]\n\n"


class StreamReader:
    """Server-sent events of one streamed answer -> deltas. The last delta waits for the usage that follows it."""

    def __init__(self, request_id: str, *, chat: bool) -> None:
        self._request_id = request_id
        self._chat = chat
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._rest = b""
        self.done = False

    def take(self, data: bytes) -> list[TokenDelta]:
        """Take in what has arrived; pieces of text that follow each other come as one delta, and the end with the last of them.

        Raises:
            SageError: the server reports an error in the stream, or something that is no event of this format.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        finished = data.endswith(_DONE)
        if not (data.startswith(b"data:") and data.endswith(b"\n\n")) or b"\r" in data:
            return self._deltas(*self._by_line(data))
        # Whole events and nothing else, as nearly always: with commas between them they are a JSON list.
        events = data[5 : -len(_DONE)] if finished else data[5:]
        try:
            chunks = _CHUNKS.decode(b"[" + events.replace(b"\n\ndata:", b",") + b"]")
        except msgspec.DecodeError:  # there is a comment among them, perhaps
            chunks, finished = self._by_line(data)
        return self._deltas(chunks, finished)

    def _by_line(self, data: bytes) -> tuple[list[_Chunk], bool]:
        """Decode what is complete, and keep the rest; also return whether the stream says that it has ended."""
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(self._rest) > MAX_LINE_BYTES:
            raise EngineDiedError(f"the engine sent a line of more than {MAX_LINE_BYTES} bytes")
        events = [line[5:] for line in data[:end].split(b"\n") if line.startswith(b"data:")]
        last = next((i for i, event in enumerate(events) if event.strip() == b"[DONE]"), None)
        try:
            return _CHUNKS.decode(b"[" + b",".join(events[:last]) + b"]"), last is not None
        except msgspec.DecodeError as error:
            raise EngineDiedError(f"the engine sent an event that is none of this format: {error}") from None

    def _deltas(self, chunks: Iterable[_Chunk], finished: bool) -> list[TokenDelta]:
        out: list[TokenDelta] = []
        texts: list[str] = []
        chat = self._chat
        for chunk in chunks:
            if chunk.usage is not None or chunk.error:
                self._note(chunk)
            if not chunk.choices:
                continue
            choice = chunk.choices[0]
            if choice.finish_reason:
                self._finish = _FINISH.get(choice.finish_reason, "stop")
            delta = choice.delta or _NOTHING
            text = delta.content if chat else choice.text
            reasoning = delta.reasoning_content or delta.reasoning
            if reasoning or delta.tool_calls:
                if texts:
                    out.append(self._text(texts))
                    texts = []
                out.append(self._mixed(text, reasoning, delta.tool_calls))
            elif text:
                texts.append(text)
        end = self._end(texts) if finished else None
        if end is not None:
            out.append(end)
        elif texts:
            out.append(self._text(texts))
        return out

    def _note(self, chunk: _Chunk) -> None:
        """Take in what is not content."""
        if chunk.error:
            raise UnavailableError(f"the engine reports: {_message_of({'error': chunk.error})[:200]}")
        if chunk.usage is not None:
            self._usage = _usage_of(chunk.usage)

    def _text(self, texts: Sequence[str]) -> TokenDelta:
        return TokenDelta(request_id=self._request_id, text="".join(texts), text_tokens=len(texts))

    def _mixed(self, text: str | None, reasoning: str | None, calls: list[dict[str, Any]] | None) -> TokenDelta:
        return TokenDelta(
            request_id=self._request_id,
            text=text or None,
            reasoning=reasoning or None,
            tool_calls=tuple(map(_tool_call, calls)) if calls else (),
        )

    def end(self) -> TokenDelta | None:
        """The stream is over: return its last delta, once, if the server had said why it ended."""
        return self._end(())

    def _end(self, texts: Sequence[str]) -> TokenDelta | None:
        if self.done or self._finish is None:
            return None
        self.done = True
        usage = self._usage
        return TokenDelta(
            request_id=self._request_id,
            text="".join(texts) or None,
            text_tokens=len(texts),
            finish_reason=self._finish,
            usage=usage,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else 0,
        )


_NOTHING = _Delta()


def _usage_of(usage: _Usage) -> Usage:
    details = usage.prompt_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
    )


_FINISH: dict[str, FinishReason] = {
    "stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls", "abort": "cancelled",
}  # fmt: skip


def _tool_call(call: dict[str, Any]) -> ToolCallDelta:
    function = call.get("function") or {}
    return ToolCallDelta(
        index=call.get("index") or 0,
        id=call.get("id"),
        name=function.get("name"),
        arguments=function.get("arguments") or "",
    )


def _message_of(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("message", error))
    return str(error or body)


_BY_STATUS: dict[int, type[SageError]] = {
    401: UnauthenticatedError, 403: PermissionDeniedError, 404: ModelNotFoundError, 429: ResourceExhaustedError,
}  # fmt: skip


def error_of_status(status: int, body: bytes, headers: Mapping[str, str]) -> SageError:
    """Return what a reply that is not 200 means: 4xx is the request's fault, 429 and 5xx may go elsewhere."""
    try:
        message = _message_of(msgspec.json.decode(body))
    except msgspec.DecodeError:
        message = body.decode("utf-8", "replace")
    message = message[:300] or f"status {status}"
    try:
        retry_after = float(headers.get("retry-after", ""))
    except ValueError:
        retry_after = None
    default = InvalidArgumentError if 400 <= status < 500 else UnavailableError
    return _BY_STATUS.get(status, default)(f"the engine refused: {message}", retry_after_s=retry_after)


_LOAD = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred"),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage", "llamacpp:kv_cache_usage_ratio"),
    "generated": ("vllm:generation_tokens_total", "sglang:generation_tokens_total", "llamacpp:tokens_predicted_total"),
}  # fmt: skip

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+([-+0-9.eE]+|NaN|[+-]Inf)", re.MULTILINE)


def parse_load(text: str) -> dict[str, float]:
    """Return running, waiting, kv_usage (0-1) and generated, as far as a server's Prometheus page has them."""
    found: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        for key, names in _LOAD.items():
            if name in names and value not in ("NaN", "+Inf", "-Inf"):
                found[key] = found.get(key, 0.0) + float(value)
    return found
