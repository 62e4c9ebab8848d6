"""Tools for models whose template knows none, and the grammar that forces a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.generation import ChatMessage, FunctionSpec
from sagellm_protocol.sampling import GrammarSpec

__all__ = ["call_grammar", "chosen_tools", "with_tool_prompt"]

_PROMPT = """\
You can call functions to help with the user's request. Each line between the tags describes one of them as JSON:
<tools>
{tools}
</tools>
To call a function, answer with its name and arguments as JSON between tags, and nothing else:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>
The function's result then comes between <tool_response> tags. Answer without a call when none is needed."""


def chosen_tools(tools: Sequence[FunctionSpec], choice: str) -> tuple[FunctionSpec, ...]:
    """Return the tools that may be called under `tool_choice`.

    Raises:
        InvalidArgumentError: the choice needs a tool that is not there.
    """
    if choice == "none":
        return ()
    if choice == "auto":
        return tuple(tools)
    if choice == "required":
        if not tools:
            raise InvalidArgumentError(
                "tool_choice is required, but there are no tools: pass some", param="tool_choice"
            )
        return tuple(tools)
    named = tuple(tool for tool in tools if tool.name == choice)
    if not named:
        have = ", ".join(tool.name for tool in tools) or "none"
        raise InvalidArgumentError(f"tool_choice names {choice!r}; the tools are: {have}", param="tool_choice")
    return named


def with_tool_prompt(messages: Sequence[ChatMessage], tools: Sequence[FunctionSpec]) -> list[ChatMessage]:
    """Return the conversation for a template that knows no tools: they stand in the system message, calls and results in text."""
    out = [_plain(message) for message in messages]
    if not tools:
        return out
    prompt = _PROMPT.format(tools="\n".join(_described(tool) for tool in tools))
    if out and out[0].role in ("system", "developer"):
        out[0] = msgspec.structs.replace(out[0], content=f"{out[0].content or ''}\n\n{prompt}".lstrip())
        return out
    return [ChatMessage(role="system", content=prompt), *out]


def _plain(message: ChatMessage) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage(role="user", content=f"<tool_response>\n{message.content or ''}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = "\n".join(
        f'<tool_call>\n{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments or "{}"}}}\n</tool_call>'
        for call in message.tool_calls
    )
    content = f"{message.content}\n{calls}" if message.content else calls
    return msgspec.structs.replace(message, content=content, tool_calls=())


def _described(tool: FunctionSpec) -> str:
    value: dict[str, Any] = {"name": tool.name}
    if tool.description:
        value["description"] = tool.description
    value["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return json.dumps(value, ensure_ascii=False)


def call_grammar(tools: Sequence[FunctionSpec]) -> GrammarSpec:
    """Return the grammar of one call of one of `tools`, as plain JSON."""
    if len(tools) == 1:
        schema = _call_schema(tools[0], "#")
    else:
        schema = {"anyOf": [_call_schema(tool, f"#/anyOf/{index}") for index, tool in enumerate(tools)]}
    return GrammarSpec(kind="json_schema", source=json.dumps(schema))


def _call_schema(tool: FunctionSpec, place: str) -> dict[str, Any]:
    parameters = tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": _moved(parameters, f"{place}/properties/arguments")},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """References to the schema's own root point to where it stands now."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema
