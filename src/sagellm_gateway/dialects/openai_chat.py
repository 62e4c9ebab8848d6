"""POST /v1/chat/completions: wire types, request -> neutral, events -> JSON and SSE frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from sagellm_gateway.config import Limits
from sagellm_gateway.dialects.openai_common import (
    NO_DEFAULTS,
    ContentPart,
    Head,
    SamplingFields,
    StreamOptions,
    ToolWire,
    UsageTail,
    UsageWish,
    check_model,
    encode_json,
    grammar_of,
    sampling_of,
    text_of_content,
    token_logprob_json,
    tools_of,
    usage_json,
)
from sagellm_gateway.errors import openai_body
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnsupportedError
from sagellm_protocol.generation import (
    ChatMessage,
    ChoiceDelta,
    FunctionCall,
    GenerationEnd,
    GenerationRequest,
    GenerationStart,
    Priority,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

__all__ = ["KNOWN", "ChatBody", "ChatFrames", "ChatResult", "request_of"]


class FunctionCallWire(msgspec.Struct, kw_only=True):
    """The function of a tool call."""

    name: str
    arguments: str = ""


class ToolCallWire(msgspec.Struct, kw_only=True):
    """A call that the assistant made, as the client sends it back."""

    id: str
    function: FunctionCallWire
    type: str = "function"


class MessageWire(msgspec.Struct, kw_only=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallWire] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None


class JsonSchemaWire(msgspec.Struct, kw_only=True):
    """`response_format.json_schema`."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormatWire(msgspec.Struct, kw_only=True):
    """`response_format`."""

    type: str
    json_schema: JsonSchemaWire | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    """The function that `tool_choice` names."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    """`tool_choice` as an object."""

    type: str
    function: NamedFunction | None = None


class ChatBody(SamplingFields, kw_only=True):
    """The request body."""

    model: str
    messages: list[MessageWire]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolWire] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormatWire | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    modalities: list[str] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    session_id: str | None = None


KNOWN = frozenset(ChatBody.__struct_fields__)


def request_of(
    body: ChatBody, request_id: str, limits: Limits, *, defaults: Mapping[str, float] = NO_DEFAULTS, **extra: Any
) -> GenerationRequest:
    """Translate `body`; `extra` sets tenant, trace id and the like.

    Raises:
        InvalidArgumentError: something is missing, contradictory or out of range.
        UnsupportedError: something is asked for that no model here can do.
    """
    if not body.messages:
        raise InvalidArgumentError("messages is empty: send at least one message", param="messages")
    if body.modalities is not None and body.modalities != ["text"]:
        raise UnsupportedError('modalities must be ["text"]: audio output is not offered', param="modalities")
    tools = tools_of(body.tools, limits) if body.tools else ()
    metadata = dict(body.metadata) if body.metadata else {}
    if body.user:
        metadata["user"] = body.user
    return GenerationRequest(
        request_id=request_id,
        model=check_model(body.model),
        messages=tuple([_message(m, i) for i, m in enumerate(body.messages)]),
        sampling=sampling_of(
            body,
            limits,
            defaults=defaults,
            max_tokens=_max_tokens(body),
            max_tokens_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            logprobs=_logprobs(body),
            grammar=_grammar(body.response_format, limits) if body.response_format is not None else None,
        ),
        n=choices_of(body.n, limits),
        tools=tools,
        tool_choice=_tool_choice(body.tool_choice, {t.name for t in tools})
        if body.tool_choice is not None or tools
        else "none",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=None if body.reasoning_effort is None else body.reasoning_effort not in ("none", "minimal"),
        priority=priority_of(body.priority),
        metadata=metadata,
        **extra,
    )


def priority_of(priority: int | None) -> int:
    """Return the band: 0 (critical) to 4 (background)."""
    if priority is None:
        return Priority.NORMAL
    if not Priority.CRITICAL <= priority <= Priority.BACKGROUND:
        raise InvalidArgumentError(f"priority is {priority}: it must be 0 to 4, 2 is normal", param="priority")
    return priority


def choices_of(n: int | None, limits: Limits) -> int:
    """Return the number of choices."""
    if n is None:
        return 1
    if not 1 <= n <= limits.choices:
        raise InvalidArgumentError(f"n is {n}: it must be 1 to {limits.choices}", param="n")
    return n


_PLAIN_ROLES = ("system", "developer", "user")


def _message(wire: MessageWire, i: int) -> ChatMessage:
    content = wire.content
    if isinstance(content, str) and wire.role in _PLAIN_ROLES and not wire.tool_calls:
        return ChatMessage(
            role=wire.role,
            content=content,
            name=wire.name,
            tool_call_id=wire.tool_call_id,
            reasoning=wire.reasoning_content,
        )
    content = text_of_content(content, f"messages[{i}].content")
    if wire.role == "assistant":
        if content is None:
            content = wire.refusal
        if content is None and not wire.tool_calls:
            raise InvalidArgumentError(
                f"messages[{i}] has neither content nor tool_calls", param=f"messages[{i}].content"
            )
    elif content is None:
        raise InvalidArgumentError(f"messages[{i}] has no content", param=f"messages[{i}].content")
    elif wire.tool_calls:
        raise InvalidArgumentError(
            f"messages[{i}] has tool_calls but its role is {wire.role}", param=f"messages[{i}].tool_calls"
        )
    if wire.role == "tool" and not wire.tool_call_id:
        raise InvalidArgumentError(f"messages[{i}] has no tool_call_id", param=f"messages[{i}].tool_call_id")
    calls = tuple(
        ToolCall(id=c.id, function=FunctionCall(name=c.function.name, arguments=c.function.arguments))
        for c in wire.tool_calls or ()
    )
    return ChatMessage(
        role=wire.role,
        content=content,
        name=wire.name,
        tool_calls=calls,
        tool_call_id=wire.tool_call_id,
        reasoning=wire.reasoning_content,
    )


def _max_tokens(body: ChatBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidArgumentError(
            f"max_tokens is {old} and max_completion_tokens is {new}: send one of them", param="max_tokens"
        )
    return old if new is None else new


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise InvalidArgumentError("top_logprobs needs logprobs: true", param="top_logprobs")
        if not 0 <= body.top_logprobs <= 20:
            raise InvalidArgumentError(f"top_logprobs is {body.top_logprobs}: it must be 0 to 20", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _grammar(wire: ResponseFormatWire, limits: Limits) -> Any:
    schema = wire.json_schema.schema if wire.json_schema is not None else None
    return grammar_of(wire.type, schema, limits, "response_format")


def _tool_choice(choice: str | NamedTool | None, names: set[str]) -> str:
    if choice is None:
        return "auto" if names else "none"
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise InvalidArgumentError(
                f"tool_choice is {choice[:40]!r}: use auto, none, required or a function", param="tool_choice"
            )
        name = choice
    elif choice.type != "function" or choice.function is None:
        raise UnsupportedError(f"tool_choice of type {choice.type[:40]!r} is not supported", param="tool_choice")
    else:
        name = choice.function.name
        if name not in names:
            raise InvalidArgumentError(f"tool_choice names {name[:64]!r}, which is not in tools", param="tool_choice")
    if name == "required" and not names:
        raise InvalidArgumentError("tool_choice is required but tools is empty", param="tool_choice")
    return name


_ROLE = '{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'


def _dumps(value: Any) -> str:
    return encode_json(value).decode()


class ChatFrames:
    """Server-sent events of one chat completion.

    The frame around a text delta is made once; a delta costs one JSON string and two concatenations.
    """

    content_type = b"text/event-stream; charset=utf-8"
    ping = b": ping\n\n"

    def __init__(self, head: Head, n: int, *, usage: UsageWish, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._tail = UsageTail(usage)
        self._prefix = (
            f'data: {{"id":{_dumps(head.id)},"object":"chat.completion.chunk","created":{head.created},'
            f'"model":{_dumps(head.model)},"choices":[{{"index":'
        )
        self._n = n
        self._text = [f'{self._prefix}{i},"delta":{{"content":'.encode() for i in range(n)]
        self._text_end = self._text_tail()

    def _text_tail(self) -> bytes:
        return b'},"logprobs":null,"finish_reason":null}]' + self._tail.text.encode()

    def start(self, event: GenerationStart) -> bytes:
        """One chunk with the role for each choice."""
        self._tail.take(event)
        return b"".join([self._around(i, _ROLE) for i in range(self._n)])

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> bytes:
        return self._around(index, f'{_dumps(delta)},"logprobs":{_dumps(logprobs)},"finish_reason":null')

    def _around(self, index: int, rest: str) -> bytes:
        """Return a chunk; `rest` is what follows ``"delta":``."""
        return f'{self._prefix}{index},"delta":{rest}}}]{self._tail.text}'.encode()

    def delta(self, event: ChoiceDelta) -> bytes:
        """Text, reasoning, pieces of tool calls, and the finish reason, each in its own chunk."""
        if self._tail.take(event):
            self._text_end = self._text_tail()
        if event.text and not (event.reasoning or event.tool_calls or event.finish_reason or self._logprobs):
            return self._text[event.index] + encode_json(event.text) + self._text_end
        out = []
        logprobs = logprobs_json(event.logprobs) if self._logprobs and event.logprobs else None
        if event.reasoning:
            out.append(self._chunk(event.index, {"reasoning_content": event.reasoning}))
        if event.text or (logprobs and not event.reasoning):
            out.append(self._chunk(event.index, {"content": event.text}, logprobs))
        for piece in event.tool_calls:
            out.extend(self._chunk(event.index, {"tool_calls": [entry]}) for entry in tool_call_entries(piece))
        if event.finish_reason:
            out.append(self._around(event.index, f'{{}},"logprobs":null,"finish_reason":"{event.finish_reason}"'))
        return b"".join(out)

    def end(self, event: GenerationEnd) -> bytes:
        """The usage chunk where it was asked for, and the terminator."""
        done = b"data: [DONE]\n\n"
        if not self._tail.at_end:
            return done
        head = self._prefix.removesuffix('{"index":')
        return f'{head}],"usage":{_dumps(usage_json(event.usage))}}}\n\n'.encode() + done

    def error(self, error: SageError) -> bytes:
        """An error event; no terminator follows."""
        return b"data: " + encode_json(openai_body(error, "")) + b"\n\n"


def tool_call_entries(piece: ToolCallDelta) -> list[dict[str, Any]]:
    """Return the entries of one piece: a call opens with empty arguments, the arguments follow by index."""
    out: list[dict[str, Any]] = []
    if piece.id is not None or piece.name is not None:
        out.append(
            {
                "index": piece.index,
                "id": piece.id,
                "type": "function",
                "function": {"name": piece.name, "arguments": ""},
            }
        )
    if piece.arguments:
        out.append({"index": piece.index, "function": {"arguments": piece.arguments}})
    return out


def logprobs_json(entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Return a choice's `logprobs` object."""
    return {"content": [token_logprob_json(e) for e in entries], "refusal": None}


class _Choice:
    __slots__ = ("calls", "finish_reason", "logprobs", "reasoning", "text")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, dict[str, Any]] = {}
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None

    def add(self, event: ChoiceDelta) -> None:
        if event.text:
            self.text.append(event.text)
        if event.reasoning:
            self.reasoning.append(event.reasoning)
        for piece in event.tool_calls:
            call = self.calls.setdefault(piece.index, {"id": "", "name": "", "arguments": []})
            call["id"] = piece.id or call["id"]
            call["name"] = piece.name or call["name"]
            call["arguments"].append(piece.arguments)
        if event.logprobs:
            self.logprobs.extend(event.logprobs)
        if event.finish_reason:
            self.finish_reason = event.finish_reason


class ChatResult:
    """Gathers the events of one request into the body of a plain answer."""

    def __init__(self, n: int) -> None:
        self.choices = [_Choice() for _ in range(n)]
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    def add(self, event: GenerationStart | ChoiceDelta | GenerationEnd) -> None:
        """Take one event."""
        if type(event) is ChoiceDelta:
            self.choices[event.index].add(event)
        elif type(event) is GenerationEnd:
            self.usage = event.usage

    def body(self, head: Head, *, logprobs: bool) -> dict[str, Any]:
        """Return the `chat.completion` object."""
        return {
            "id": head.id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [
                {
                    "index": i,
                    "message": self._message(choice),
                    "logprobs": logprobs_json(tuple(choice.logprobs)) if logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for i, choice in enumerate(self.choices)
            ],
            "usage": usage_json(self.usage),
        }

    def message(self, index: int) -> dict[str, Any]:
        """Return the message of one choice."""
        return self._message(self.choices[index])

    @staticmethod
    def _message(choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {
                    "id": c["id"],
                    "type": "function",
                    "function": {"name": c["name"], "arguments": "".join(c["arguments"])},
                }
                for _, c in sorted(choice.calls.items())
            ]
        return message
