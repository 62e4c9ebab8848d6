"""POST /api/chat and /api/generate: wire types, request -> neutral, events -> JSON lines."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from sagellm_gateway.config import Limits
from sagellm_gateway.dialects.anthropic import arguments_object
from sagellm_gateway.dialects.openai_common import NO_DEFAULTS, ToolWire, check_model, encode_json, grammar_of, tools_of
from sagellm_gateway.errors import ollama_body
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnsupportedError
from sagellm_protocol.generation import (
    ChatMessage,
    ChoiceDelta,
    FunctionCall,
    GenerationEnd,
    GenerationRequest,
    GenerationStart,
    ToolCall,
    Usage,
)
from sagellm_protocol.sampling import SamplingParams

__all__ = [
    "KNOWN_CHAT",
    "KNOWN_GENERATE",
    "OllamaChatBody",
    "OllamaFrames",
    "OllamaGenerateBody",
    "OllamaResult",
    "chat_request",
    "generate_request",
    "ignored_options",
]


class OllamaFunction(msgspec.Struct, kw_only=True):
    """The function of a call; arguments are an object here, not text."""

    name: str
    arguments: dict[str, Any] = {}


class OllamaCall(msgspec.Struct, kw_only=True):
    """A call that the assistant made."""

    function: OllamaFunction
    id: str | None = None


class OllamaMessage(msgspec.Struct, kw_only=True):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaCommon(msgspec.Struct, kw_only=True):
    """What chat and generate share. `stream` is true unless it is switched off."""

    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: str | float | None = None


class OllamaChatBody(OllamaCommon, kw_only=True):
    """The request body of chat."""

    messages: list[OllamaMessage] = []
    tools: list[ToolWire] | None = None


class OllamaGenerateBody(OllamaCommon, kw_only=True):
    """The request body of generate."""

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None


KNOWN_CHAT = frozenset(OllamaChatBody.__struct_fields__)
KNOWN_GENERATE = frozenset(OllamaGenerateBody.__struct_fields__)
_REFUSED = {
    "template": "templates come with the model, never with a request",
    "images": "this model reads text only",
    "context": "send the conversation to /api/chat instead",
}

# Ollama's name -> ours, and the type that it must have.
_OPTIONS: dict[str, tuple[str, type]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "typical_p": ("typical_p", float),
    "repeat_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "seed": ("seed", int),
}


def ignored_options(raw: dict[str, Any], known: frozenset[str]) -> list[str]:
    """Return the names in the body and in its options that have no effect.

    Raises:
        UnsupportedError: a name is refused.
    """
    for name, reason in _REFUSED.items():
        if raw.get(name):
            raise UnsupportedError(f"{name} is not supported: {reason}", param=name)
    options = raw.get("options") or {}
    extra = options.keys() - _OPTIONS.keys() - {"num_predict", "stop"} if isinstance(options, dict) else set()
    ignored = sorted(raw.keys() - known) + [f"options.{name}" for name in sorted(extra)]
    return ["keep_alive", *ignored] if raw.get("keep_alive") is not None else ignored


def _sampling(body: OllamaCommon, limits: Limits, defaults: Mapping[str, float]) -> SamplingParams:
    # Without a recommendation of the model: Ollama's own default; ours would be 1.
    given: dict[str, Any] = {"temperature": 0.8, **defaults}
    options = body.options or {}
    for name, (ours, type_) in _OPTIONS.items():
        value = options.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (type_ is int and value != int(value)):
            raise InvalidArgumentError(f"options.{name} must be a number", param=f"options.{name}")
        given[ours] = type_(value)
    limit = options.get("num_predict")
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit == 0 or limit < -2:
            raise InvalidArgumentError("options.num_predict must be -2, -1 or positive", param="options.num_predict")
        if limit > 0:
            given["max_tokens"] = limit
    if options.get("stop") is not None:
        given["stop"] = _stops(options["stop"], limits)
    if body.format:
        given["grammar"] = _grammar(body.format, limits)
    return SamplingParams(**given)


def _stops(stop: Any, limits: Limits) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise InvalidArgumentError("options.stop must be a list of non-empty strings", param="options.stop")
    if len(stops) > limits.stop_strings:
        raise InvalidArgumentError(f"options.stop has more than {limits.stop_strings} strings", param="options.stop")
    return tuple(stops)


def _grammar(form: str | dict[str, Any], limits: Limits) -> Any:
    if isinstance(form, dict):
        return grammar_of("json_schema", form, limits, "format")
    if form != "json":
        raise InvalidArgumentError(f'format is {form[:40]!r}: use "json" or a JSON schema', param="format")
    return grammar_of("json_object", None, limits, "format")


def _think(think: bool | str | None) -> bool | None:
    if think is None or isinstance(think, bool):
        return think
    if think not in ("low", "medium", "high", "max"):
        raise InvalidArgumentError(f"think is {think[:40]!r}: use true, false, low, medium or high", param="think")
    return True


def chat_request(
    body: OllamaChatBody, request_id: str, limits: Limits, *, defaults: Mapping[str, float] = NO_DEFAULTS, **extra: Any
) -> GenerationRequest:
    """Translate a chat.

    Raises:
        InvalidArgumentError: something is missing or out of range.
        UnsupportedError: images.
    """
    tools = tools_of(body.tools, limits)
    return GenerationRequest(
        request_id=request_id,
        model=check_model(body.model),
        messages=tuple(_message(m, i) for i, m in enumerate(body.messages)),
        sampling=_sampling(body, limits, defaults),
        tools=tools,
        tool_choice="auto" if tools else "none",
        reasoning=_think(body.think),
        **extra,
    )


def _message(wire: OllamaMessage, i: int) -> ChatMessage:
    if wire.images:
        raise UnsupportedError(f"messages[{i}].images: this model reads text only", param=f"messages[{i}].images")
    calls = tuple(
        ToolCall(
            id=c.id or f"call_{i}_{k}",
            function=FunctionCall(name=c.function.name, arguments=encode_json(c.function.arguments).decode()),
        )
        for k, c in enumerate(wire.tool_calls or ())
    )
    return ChatMessage(
        role=wire.role,
        content=wire.content if wire.content is not None or calls else "",
        name=wire.tool_name,
        tool_calls=calls,
        tool_call_id=wire.tool_call_id,
        reasoning=wire.thinking,
    )


def generate_request(
    body: OllamaGenerateBody,
    request_id: str,
    limits: Limits,
    *,
    defaults: Mapping[str, float] = NO_DEFAULTS,
    **extra: Any,
) -> GenerationRequest:
    """Translate a generate call: raw prompts and gaps to fill are not templated, others become a chat of one turn.

    Raises:
        InvalidArgumentError: something is missing or out of range.
    """
    content: dict[str, Any]
    if body.raw or body.suffix:
        if body.system:
            raise InvalidArgumentError("system has no place in a raw prompt: write it into prompt", param="system")
        content = {"prompt": body.prompt, "suffix": body.suffix or ""}
    else:
        system = [ChatMessage(role="system", content=body.system)] if body.system else []
        content = {"messages": (*system, ChatMessage(role="user", content=body.prompt))}
    return GenerationRequest(
        request_id=request_id,
        model=check_model(body.model),
        sampling=_sampling(body, limits, defaults),
        reasoning=_think(body.think),
        **content,
        **extra,
    )


def timestamp() -> str:
    """Return now as Ollama writes it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")


class _Shaper:
    """Text, thoughts and calls -> the `message` (chat) or the fields of generate."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model = model
        self.chat = chat
        self.began = time.monotonic()
        self.calls: dict[int, dict[str, Any]] = {}
        self.finish = "stop"

    def wrap(self, text: str, thinking: str, calls: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"model": self.model, "created_at": timestamp()}
        if not self.chat:
            fields: dict[str, Any] = {"response": text}
            if thinking:
                fields["thinking"] = thinking
            return {**head, **fields, **more}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {**head, "message": message, **more}

    def take_calls(self, event: ChoiceDelta) -> None:
        for piece in event.tool_calls:
            call = self.calls.setdefault(piece.index, {"id": "", "name": "", "arguments": []})
            call["id"] = piece.id or call["id"]
            call["name"] = piece.name or call["name"]
            call["arguments"].append(piece.arguments)
        if event.finish_reason:
            self.finish = "length" if event.finish_reason == "length" else "stop"

    def whole_calls(self) -> list[dict[str, Any]]:
        calls = [
            {
                "id": c["id"],
                "function": {"index": i, "name": c["name"], "arguments": arguments_object("".join(c["arguments"]))},
            }
            for i, c in sorted(self.calls.items())
        ]
        self.calls.clear()
        return calls

    def final(self, usage: Usage, ttft_s: float | None) -> dict[str, Any]:
        total = time.monotonic() - self.began
        prompt = min(total, ttft_s if ttft_s is not None else total)
        return {
            "done": True,
            "done_reason": self.finish,
            "total_duration": int(total * 1e9),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": int(prompt * 1e9),
            "eval_count": usage.completion_tokens,
            "eval_duration": int((total - prompt) * 1e9),
        }


class OllamaFrames:
    """One JSON object a line; a call is sent whole once it is complete."""

    content_type = b"application/x-ndjson"
    ping = b""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._shaper = _Shaper(model, chat=chat)

    def start(self, event: GenerationStart) -> bytes:  # noqa: ARG002  (one signature for all dialects)
        """Nothing: the first line is the first token."""
        return b""

    def delta(self, event: ChoiceDelta) -> bytes:
        """A line with the text or the thought."""
        shaper = self._shaper
        shaper.take_calls(event)
        calls = shaper.whole_calls() if event.finish_reason else []
        if not (event.text or event.reasoning or calls):
            return b""
        return encode_json(shaper.wrap(event.text, event.reasoning, calls, done=False)) + b"\n"

    def end(self, event: GenerationEnd) -> bytes:
        """The line with ``done: true`` and the counts."""
        return encode_json(self._shaper.wrap("", "", [], **self._shaper.final(event.usage, event.ttft_s))) + b"\n"

    def error(self, error: SageError) -> bytes:
        """A line with ``error``."""
        return encode_json(ollama_body(error, "")) + b"\n"


class OllamaResult:
    """Gathers the events of one request into the body of a plain answer."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._shaper = _Shaper(model, chat=chat)
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._end: GenerationEnd | None = None

    def add(self, event: GenerationStart | ChoiceDelta | GenerationEnd) -> None:
        """Take one event."""
        if type(event) is ChoiceDelta:
            self._text.append(event.text)
            self._thinking.append(event.reasoning)
            self._shaper.take_calls(event)
        elif type(event) is GenerationEnd:
            self._end = event

    def body(self) -> dict[str, Any]:
        """Return the answer."""
        usage = self._end.usage if self._end else Usage(prompt_tokens=0, completion_tokens=0)
        final = self._shaper.final(usage, self._end.ttft_s if self._end else None)
        return self._shaper.wrap("".join(self._text), "".join(self._thinking), self._shaper.whole_calls(), **final)


def loaded(model: str, *, chat: bool, unload: bool) -> dict[str, Any]:
    """Return the answer to a call without a prompt: it only asks for the model to be there."""
    reason = "unload" if unload else "load"
    return _Shaper(model, chat=chat).wrap("", "", [], done=True, done_reason=reason)
