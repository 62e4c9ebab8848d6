"""POST /v1/responses: wire types, items -> neutral turns.

What comes back is in `sagellm_gateway.dialects.responses_builder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from sagellm_gateway.config import Limits
from sagellm_gateway.dialects.openai_common import (
    NO_DEFAULTS,
    ContentPart,
    ToolFunctionWire,
    add_tool,
    check_model,
    grammar_of,
    text_of_content,
)
from sagellm_gateway.ids import new_id
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import (
    ChatMessage,
    FunctionCall,
    FunctionSpec,
    GenerationRequest,
    ToolCall,
)
from sagellm_protocol.sampling import SamplingParams

__all__ = ["ITEM_PREFIX", "KNOWN", "REFUSED", "ResponsesBody", "input_items", "request_of", "wants_logprobs"]


class ItemWire(msgspec.Struct, kw_only=True):
    """An input item of any type; which fields must be there depends on `type`."""

    type: str | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    status: str | None = None
    phase: str | None = None
    encrypted_content: str | None = None


class ResponsesTool(msgspec.Struct, kw_only=True):
    """An entry of `tools`: functions are flat here."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesNamedTool(msgspec.Struct, kw_only=True):
    """`tool_choice` as an object."""

    type: str
    name: str | None = None


class ReasoningWire(msgspec.Struct, kw_only=True):
    """`reasoning`."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class FormatWire(msgspec.Struct, kw_only=True):
    """`text.format`."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextWire(msgspec.Struct, kw_only=True):
    """`text`."""

    format: FormatWire | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """The request body."""

    model: str
    input: str | list[ItemWire] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: str | ResponsesNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextWire | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    reasoning: ReasoningWire | None = None
    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


KNOWN = frozenset(ResponsesBody.__struct_fields__)
REFUSED = {
    "conversation": "use previous_response_id",
    "prompt": "stored prompt templates are not offered",
    "context_management": "send the items that the model should see",
}
_LOGPROBS = "message.output_text.logprobs"


def input_items(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return the items of `body` as they are stored and listed, each with an id.

    Raises:
        InvalidArgumentError: there is no input.
    """
    if body.input is None or body.input == []:
        if body.previous_response_id is None:
            raise InvalidArgumentError("input is missing: send text or items", param="input")
        return []
    items = [ItemWire(type="message", role="user", content=body.input)] if isinstance(body.input, str) else body.input
    out = []
    for item in items:
        plain = {k: v for k, v in msgspec.to_builtins(item).items() if v is not None}
        kind = plain.setdefault("type", "message")
        plain.setdefault("id", new_id(ITEM_PREFIX.get(kind, "item_")))
        if kind == "message":
            plain.setdefault("status", "completed")
            if isinstance(plain.get("content"), str):
                part = "output_text" if plain.get("role") == "assistant" else "input_text"
                plain["content"] = [{"type": part, "text": plain["content"]}]
            plain["content"] = [_clean(p) for p in plain.get("content", [])]
        out.append(plain)
    return out


ITEM_PREFIX = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def _clean(part: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in part.items() if v is not None}
    if plain.get("type") == "output_text":
        plain.setdefault("annotations", [])
    return plain


def request_of(
    body: ResponsesBody,
    items: list[dict[str, Any]],
    request_id: str,
    limits: Limits,
    *,
    defaults: Mapping[str, float] = NO_DEFAULTS,
    **extra: Any,
) -> GenerationRequest:
    """Translate `body` with the whole history `items` (earlier responses first).

    Raises:
        InvalidArgumentError: something is missing, contradictory or out of range.
        UnsupportedError: an item, tool or setting that no model here can do.
    """
    if body.truncation == "auto":
        raise UnsupportedError(
            "truncation auto is not supported: a prompt is never shortened silently", param="truncation"
        )
    tools = _tools(body.tools, limits)
    metadata = dict(body.metadata or {})
    if body.user:
        metadata["user"] = body.user
    effort = body.reasoning.effort if body.reasoning is not None else None
    return GenerationRequest(
        request_id=request_id,
        model=check_model(body.model),
        messages=tuple(_messages(body.instructions, items)),
        sampling=_sampling(body, limits, defaults),
        tools=tuple(tools.values()),
        tool_choice=_tool_choice(body.tool_choice, tools),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=None if effort is None else effort not in ("none", "minimal"),
        metadata=metadata,
        **extra,
    )


def _tools(tools: list[ResponsesTool] | None, limits: Limits) -> dict[str, FunctionSpec]:
    out: dict[str, FunctionSpec] = {}
    for i, tool in enumerate(tools or ()):
        if tool.type != "function":
            raise UnsupportedError(
                f"tools[{i}] is of type {tool.type[:40]!r}: only function tools are supported", param=f"tools[{i}].type"
            )
        wire = ToolFunctionWire(
            name=tool.name or "", description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
        add_tool(out, i, wire, limits)
    return out


def _tool_choice(choice: str | ResponsesNamedTool | None, tools: dict[str, FunctionSpec]) -> str:
    if choice is None:
        return "auto" if tools else "none"
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise InvalidArgumentError(
                f"tool_choice is {choice[:40]!r}: use auto, none, required or a function", param="tool_choice"
            )
        if choice == "required" and not tools:
            raise InvalidArgumentError("tool_choice is required but tools is empty", param="tool_choice")
        return choice
    if choice.type != "function":
        raise UnsupportedError(f"tool_choice of type {choice.type[:40]!r} is not supported", param="tool_choice")
    if choice.name not in tools:
        raise InvalidArgumentError(
            f"tool_choice names {(choice.name or '')[:64]!r}, which is not in tools", param="tool_choice"
        )
    return str(choice.name)


def _sampling(body: ResponsesBody, limits: Limits, defaults: Mapping[str, float]) -> SamplingParams:
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    given: dict[str, Any] = dict(defaults)
    given.update((name, value) for name in names if (value := getattr(body, name)) is not None)
    if body.max_output_tokens is not None:
        if body.max_output_tokens < 1:
            raise InvalidArgumentError(
                f"max_output_tokens is {body.max_output_tokens}: it must be at least 1", param="max_output_tokens"
            )
        given["max_tokens"] = body.max_output_tokens
    for name in body.include or ():
        if name != _LOGPROBS:
            raise UnsupportedError(f"include: {name[:60]!r} is not supported, only {_LOGPROBS}", param="include")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= 20:
        raise InvalidArgumentError(f"top_logprobs is {body.top_logprobs}: it must be 0 to 20", param="top_logprobs")
    if wants_logprobs(body):
        given["logprobs"] = body.top_logprobs or 0
    if body.text is not None and body.text.format is not None:
        given["grammar"] = grammar_of(body.text.format.type, body.text.format.schema, limits, "text.format")
    return SamplingParams(**given)


def wants_logprobs(body: ResponsesBody) -> bool:
    """Return whether output text carries log probabilities."""
    return bool(body.top_logprobs) or _LOGPROBS in (body.include or ())


def _messages(instructions: str | None, items: list[dict[str, Any]]) -> list[ChatMessage]:
    out: list[ChatMessage] = []
    if instructions:
        out.append(ChatMessage(role="system", content=instructions))
    turn = _Assistant()
    for i, raw in enumerate(items):
        item = msgspec.convert(raw, ItemWire)
        where = f"input[{i}]"
        if item.type == "message" and item.role == "assistant":
            turn.say(text_of_content(item.content, f"{where}.content") or "")
        elif item.type == "function_call":
            turn.call(item, where)
        elif item.type == "reasoning":
            turn.think(item)
        else:
            out.extend(turn.flush())
            out.append(_other(item, where))
    out.extend(turn.flush())
    if not out:
        raise InvalidArgumentError("input is empty: send at least one message", param="input")
    return out


def _other(item: ItemWire, where: str) -> ChatMessage:
    if item.type == "message":
        if item.role is None:
            raise InvalidArgumentError(f"{where}.role is missing", param=f"{where}.role")
        content = text_of_content(item.content, f"{where}.content")
        if content is None:
            raise InvalidArgumentError(f"{where} has no content", param=f"{where}.content")
        return ChatMessage(role=item.role, content=content)
    if item.type == "function_call_output":
        if not item.call_id:
            raise InvalidArgumentError(f"{where}.call_id is missing", param=f"{where}.call_id")
        text = text_of_content(item.output, f"{where}.output")
        return ChatMessage(role="tool", content=text or "", tool_call_id=item.call_id)
    raise UnsupportedError(
        f"{where} is of type {(item.type or '')[:40]!r}: use message, function_call, function_call_output, reasoning or item_reference",
        param=where,
    )


class _Assistant:
    """Gathers the items of one assistant turn: thoughts, text, calls."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[ToolCall] = []

    def say(self, text: str) -> None:
        self.text.append(text)

    def think(self, item: ItemWire) -> None:
        content = item.content if isinstance(item.content, list) else []
        self.thoughts.extend(p.text for p in content if p.text)

    def call(self, item: ItemWire, where: str) -> None:
        if not item.call_id or not item.name:
            raise InvalidArgumentError(f"{where} needs call_id and name", param=where)
        self.calls.append(
            ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments or ""))
        )

    def flush(self) -> list[ChatMessage]:
        if not (self.text or self.calls):
            self.thoughts.clear()
            return []
        message = ChatMessage(
            role="assistant",
            content="".join(self.text) if self.text else None,
            tool_calls=tuple(self.calls),
            reasoning="".join(self.thoughts) or None,
        )
        self.text, self.thoughts, self.calls = [], [], []
        return [message]
