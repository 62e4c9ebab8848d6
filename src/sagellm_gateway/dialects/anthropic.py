"""POST /v1/messages and /v1/messages/count_tokens: wire types, request -> neutral, events -> JSON and SSE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from sagellm_gateway.config import Limits
from sagellm_gateway.dialects.openai_common import (
    NO_DEFAULTS,
    Head,
    ToolFunctionWire,
    add_tool,
    check_model,
    encode_json,
    grammar_of,
)
from sagellm_gateway.errors import anthropic_body
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnsupportedError
from sagellm_protocol.generation import (
    ChatMessage,
    ChoiceDelta,
    FunctionCall,
    FunctionSpec,
    GenerationEnd,
    GenerationRequest,
    GenerationStart,
    ToolCall,
    Usage,
)
from sagellm_protocol.sampling import SamplingParams

__all__ = ["KNOWN", "KNOWN_COUNT", "CountBody", "MessagesBody", "MessagesFrames", "MessagesResult", "request_of"]


class Block(msgspec.Struct, kw_only=True):
    """A content block of any type; which fields must be there depends on `type`."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    thinking: str | None = None


class TurnWire(msgspec.Struct, kw_only=True):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(msgspec.Struct, kw_only=True):
    """An entry of `tools`."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class AnthropicToolChoice(msgspec.Struct, kw_only=True):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct, kw_only=True):
    """`output_config.format`: structured output."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct, kw_only=True):
    """`output_config`."""

    format: OutputFormat | None = None


class MessagesMetadata(msgspec.Struct, kw_only=True):
    """`metadata`."""

    user_id: str | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """The request body of count_tokens, and what messages shares with it."""

    model: str
    messages: list[TurnWire]
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None


class MessagesBody(CountBody, kw_only=True):
    """The request body of messages."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: MessagesMetadata | None = None
    output_config: OutputConfig | None = None


KNOWN = frozenset(MessagesBody.__struct_fields__)
KNOWN_COUNT = frozenset(CountBody.__struct_fields__)


def request_of(
    body: CountBody, request_id: str, limits: Limits, *, defaults: Mapping[str, float] = NO_DEFAULTS, **extra: Any
) -> GenerationRequest:
    """Translate `body`.

    Raises:
        InvalidArgumentError: something is missing, contradictory or out of range.
        UnsupportedError: a block or tool of a kind that no model here can do.
    """
    if not body.messages:
        raise InvalidArgumentError("messages: at least one message is required", param="messages")
    tools: dict[str, FunctionSpec] = {}
    for i, tool in enumerate(body.tools or ()):
        if tool.type not in (None, "custom"):
            raise UnsupportedError(
                f"tools[{i}] is of type {tool.type[:40]!r}: only custom tools are supported", param=f"tools[{i}].type"
            )
        wire = ToolFunctionWire(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
        add_tool(tools, i, wire, limits)
    messages = [*_system(body.system)]
    for i, turn in enumerate(body.messages):
        messages.extend(_turn(turn, i))
    metadata = {}
    if isinstance(body, MessagesBody) and body.metadata is not None and body.metadata.user_id:
        metadata["user"] = body.metadata.user_id
    choice = body.tool_choice
    return GenerationRequest(
        request_id=request_id,
        model=check_model(body.model),
        messages=tuple(messages),
        sampling=_sampling(body, limits, defaults) if isinstance(body, MessagesBody) else SamplingParams(),
        tools=tuple(tools.values()),
        tool_choice=_tool_choice(choice, tools),
        parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
        reasoning=None if body.thinking is None else body.thinking.type != "disabled",
        metadata=metadata,
        **extra,
    )


def _system(system: str | list[Block] | None) -> list[ChatMessage]:
    if not system:
        return []
    text = system if isinstance(system, str) else "\n".join(_text(b, f"system[{j}]") for j, b in enumerate(system))
    return [ChatMessage(role="system", content=text)]


def _text(block: Block, where: str) -> str:
    if block.type != "text":
        raise UnsupportedError(
            f"{where} is of type {block.type[:40]!r}: this model reads text only, send blocks of type text", param=where
        )
    if block.text is None:
        raise InvalidArgumentError(f"{where}.text is missing", param=f"{where}.text")
    return block.text


def _turn(turn: TurnWire, i: int) -> list[ChatMessage]:
    if isinstance(turn.content, str):
        return [ChatMessage(role=turn.role, content=turn.content)]
    if turn.role == "assistant":
        return [_assistant(turn.content, i)]
    out: list[ChatMessage] = []
    texts: list[str] = []
    for j, block in enumerate(turn.content):
        where = f"messages[{i}].content[{j}]"
        if block.type == "tool_result":
            out.append(_tool_result(block, where))
        else:
            texts.append(_text(block, where))
    if texts or not out:
        out.append(ChatMessage(role="user", content="".join(texts)))
    return out


def _tool_result(block: Block, where: str) -> ChatMessage:
    if not block.tool_use_id:
        raise InvalidArgumentError(f"{where}.tool_use_id is missing", param=f"{where}.tool_use_id")
    content = block.content or ""
    if not isinstance(content, str):
        content = "".join(_text(b, f"{where}.content[{k}]") for k, b in enumerate(content))
    if block.is_error:
        content = f"Error: {content}"
    return ChatMessage(role="tool", content=content, tool_call_id=block.tool_use_id)


def _assistant(blocks: list[Block], i: int) -> ChatMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for j, block in enumerate(blocks):
        where = f"messages[{i}].content[{j}]"
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "redacted_thinking":
            continue
        elif block.type == "tool_use":
            if not block.id or not block.name:
                raise InvalidArgumentError(f"{where} needs id and name", param=where)
            arguments = encode_json(block.input or {}).decode()
            calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
        else:
            texts.append(_text(block, where))
    return ChatMessage(
        role="assistant",
        content="".join(texts) if texts or not calls else None,
        tool_calls=tuple(calls),
        reasoning="".join(thoughts) or None,
    )


def _sampling(body: MessagesBody, limits: Limits, defaults: Mapping[str, float]) -> SamplingParams:
    given: dict[str, Any] = dict(defaults)
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    if body.temperature is not None and not 0 <= body.temperature <= 1:
        raise InvalidArgumentError(f"temperature is {body.temperature}: it must lie in [0, 1]", param="temperature")
    if body.max_tokens < 1:
        raise InvalidArgumentError(f"max_tokens is {body.max_tokens}: it must be at least 1", param="max_tokens")
    stop = body.stop_sequences or []
    if len(stop) > limits.stop_strings:
        raise InvalidArgumentError(
            f"stop_sequences has {len(stop)} strings, the most is {limits.stop_strings}", param="stop_sequences"
        )
    if any(not s for s in stop):
        raise InvalidArgumentError("stop_sequences has an empty string: remove it", param="stop_sequences")
    if body.output_config is not None and body.output_config.format is not None:
        form = body.output_config.format
        given["grammar"] = grammar_of(form.type, form.schema, limits, "output_config.format")
    return SamplingParams(max_tokens=body.max_tokens, stop=tuple(stop), **given)


def _tool_choice(choice: AnthropicToolChoice | None, tools: dict[str, FunctionSpec]) -> str:
    if choice is None:
        return "auto" if tools else "none"
    if choice.type in ("auto", "none"):
        return choice.type
    if not tools:
        raise InvalidArgumentError(f"tool_choice is {choice.type} but tools is empty", param="tool_choice")
    if choice.type == "any":
        return "required"
    if choice.name not in tools:
        raise InvalidArgumentError(
            f"tool_choice names {(choice.name or '')[:64]!r}, which is not in tools", param="tool_choice.name"
        )
    return str(choice.name)


_STOP_REASON = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _stop(event: ChoiceDelta) -> tuple[str, str | None]:
    if event.stop_match is not None:
        return "stop_sequence", event.stop_match
    return _STOP_REASON.get(event.finish_reason or "stop", "end_turn"), None


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _message(head: Head, content: list[Any], stop: tuple[str | None, str | None], usage: Usage) -> dict[str, Any]:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        "stop_reason": stop[0],
        "stop_sequence": stop[1],
        "usage": _usage(usage),
    }


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: ".encode() + encode_json({"type": name, **data}) + b"\n\n"


class MessagesFrames:
    """Server-sent events of one message: blocks open and close as the kind of output changes."""

    content_type = b"text/event-stream; charset=utf-8"
    ping = _event("ping", {})

    def __init__(self, head: Head) -> None:
        self._head = head
        self._index = -1
        self._open: tuple[str, int] | None = None
        self._text_prefix = b""
        self._stop: tuple[str, str | None] = ("end_turn", None)

    def start(self, event: GenerationStart) -> bytes:
        """message_start, and a ping as the original sends it."""
        usage = Usage(prompt_tokens=event.prompt_tokens, completion_tokens=0)
        return _event("message_start", {"message": _message(self._head, [], (None, None), usage)}) + self.ping

    def _enter(self, kind: str, key: int, block: dict[str, Any]) -> bytes:
        if self._open == (kind, key):
            return b""
        out = self._close()
        self._index += 1
        self._open = (kind, key)
        self._text_prefix = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{self._index},'
            f'"delta":{{"type":"text_delta","text":'
        ).encode()
        return out + _event("content_block_start", {"index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        out = b""
        if self._open[0] == "thinking":
            out = self._delta({"type": "signature_delta", "signature": ""})
        self._open = None
        return out + _event("content_block_stop", {"index": self._index})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._index, "delta": delta})

    def delta(self, event: ChoiceDelta) -> bytes:
        """Deltas of the block that is open, and the events that open and close blocks."""
        out = b""
        if event.reasoning:
            out += self._enter("thinking", 0, {"type": "thinking", "thinking": "", "signature": ""})
            out += self._delta({"type": "thinking_delta", "thinking": event.reasoning})
        if event.text:
            out += self._enter("text", 0, {"type": "text", "text": ""})
            out += self._text_prefix + encode_json(event.text) + b"}}\n\n"
        for piece in event.tool_calls:
            block: dict[str, Any] = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            out += self._enter("tool_use", piece.index, block)
            if piece.arguments:
                out += self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
        if event.finish_reason:
            self._stop = _stop(event)
            out += self._close()
        return out

    def end(self, event: GenerationEnd) -> bytes:
        """message_delta with the stop reason and usage, then message_stop."""
        delta = {"stop_reason": self._stop[0], "stop_sequence": self._stop[1]}
        return (
            self._close()
            + _event("message_delta", {"delta": delta, "usage": _usage(event.usage)})
            + _event("message_stop", {})
        )

    def error(self, error: SageError) -> bytes:
        """An error event; message_stop does not follow."""
        body = anthropic_body(error, "")
        return b"event: error\ndata: " + encode_json({"type": "error", "error": body["error"]}) + b"\n\n"


class MessagesResult:
    """Gathers the events of one request into the body of a plain answer."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.keys: list[tuple[str, int]] = []
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)
        self.stop: tuple[str, str | None] = ("end_turn", None)

    def _enter(self, kind: str, key: int, block: dict[str, Any]) -> dict[str, Any]:
        if not self.keys or self.keys[-1] != (kind, key):
            self.keys.append((kind, key))
            self.blocks.append(block)
        return self.blocks[-1]

    def add(self, event: GenerationStart | ChoiceDelta | GenerationEnd) -> None:
        """Take one event."""
        if type(event) is GenerationEnd:
            self.usage = event.usage
        if type(event) is not ChoiceDelta:
            return
        if event.reasoning:
            self._enter("thinking", 0, {"type": "thinking", "thinking": [], "signature": ""})["thinking"].append(
                event.reasoning
            )
        if event.text:
            self._enter("text", 0, {"type": "text", "text": []})["text"].append(event.text)
        for piece in event.tool_calls:
            block: dict[str, Any] = self._enter(
                "tool_use", piece.index, {"type": "tool_use", "id": piece.id, "name": piece.name, "input": []}
            )
            block["input"].append(piece.arguments)
        if event.finish_reason:
            self.stop = _stop(event)

    def body(self, head: Head) -> dict[str, Any]:
        """Return the `message` object."""
        return _message(head, [_closed(b) for b in self.blocks], self.stop, self.usage)


def _closed(block: dict[str, Any]) -> dict[str, Any]:
    field = {"thinking": "thinking", "text": "text", "tool_use": "input"}[block["type"]]
    joined = "".join(block[field])
    return {**block, field: arguments_object(joined) if field == "input" else joined}


def arguments_object(text: str) -> dict[str, Any]:
    """Return the arguments of a call as an object.

    A model that was cut off, or that wrote something else than an object, leaves text that is not one: it is kept under
    the key ``_raw``, because dropping it would hide what the model did.
    """
    try:
        value = msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = None
    return value if isinstance(value, dict) else {"_raw": text}
