"""Tools for models whose template knows none, and the grammars that force a call or keep strict ones to their schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from sagellm_core.text.parsing.select import ToolFormat
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import ChatMessage, FunctionSpec
from sagellm_protocol.sampling import GrammarSpec

__all__ = ["JSON_STYLE", "call_grammar", "chosen_tools", "strict_grammar", "with_tool_prompt"]

JSON_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Fixed separators: with free white space a weak model can go on with blanks to the length limit."""

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
    out: list[ChatMessage] = []
    for index, message in enumerate(messages):
        plain = _plain(message)
        if index and message.role == messages[index - 1].role == "tool":  # templates want turns to alternate
            plain = msgspec.structs.replace(plain, content=f"{out.pop().content}\n{plain.content}")
        out.append(plain)
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


_TAGGED = r"""start: step* TEXT
step: before call "\n</tool_call>"
before[lazy]: BEFORE
BEFORE: /(?s:.*)<tool_call>\n/ & ~/(?s:.*)<tool_call>[^\n](?s:.*)/
TEXT: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/
"""
_BARE = r"""start: {mark} call | TEXT
TEXT: /(?s:.*)/ & ~/\s*\{(?s:.*)/
"""
_LISTED = r"""start: TEXT ({mark} call_list)?
call_list: " "? "[" call (", " call)* "]"
TEXT: /(?s:.*)/
"""


def strict_grammar(
    form: ToolFormat, tools: Sequence[FunctionSpec], token_id: Callable[[str], int | None]
) -> GrammarSpec:
    """Return a grammar under which text is free and calls keep to the schemas of the strict ones of `tools`.

    Args:
        form: the model's format.
        tools: of the request.
        token_id: id of a control token, None where that text is not one.

    Raises:
        UnsupportedError: the format is no JSON.
    """
    key = "parameters" if form == "llama3" else "arguments"
    calls = [_call_schema(tool, f"#/anyOf/{i}", key, strict=tool.strict) for i, tool in enumerate(tools)]
    call = f"call: %json {json.dumps({'anyOf': calls, 'x-guidance': JSON_STYLE})}\n"
    if form in ("hermes", "generic") and token_id("<tool_call>") is None:
        return GrammarSpec(kind="lark", source=_TAGGED + call)
    if form == "llama3":
        tag = token_id("<|python_tag|>")
        return GrammarSpec(kind="lark", source=_BARE.replace("{mark}", "" if tag is None else f"<[{tag}]>?") + call)
    mark = {"mistral": "[TOOL_CALLS]", "granite": "<|tool_call|>"}.get(form)
    number = None if mark is None else token_id(mark)
    if number is None:
        raise UnsupportedError(
            "strict tools with tool_choice auto need a model that calls tools in JSON: set strict to false, or tool_choice "
            "to required",
            param="tools",
        )
    return GrammarSpec(kind="lark", source=_LISTED.replace("{mark}", f"<[{number}]>") + call)


def _call_schema(tool: FunctionSpec, place: str, key: str = "arguments", *, strict: bool = True) -> dict[str, Any]:
    parameters: Any = {"type": "object"}
    if strict:
        parameters = tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: _moved(parameters, f"{place}/properties/{key}")},
        "required": ["name", key],
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
