"""The same conversation in the forms that chat templates expect: they were written against one client each.

A template is first given the usual form. Where it fails, or leaves out a call that the assistant made, the others are tried.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from sagellm_core.text.tool_prompt import with_tool_prompt
from sagellm_protocol.generation import ChatMessage, FunctionSpec

__all__ = ["Form", "drops_calls", "forms"]


@dataclass(frozen=True, slots=True)
class Form:
    """How a conversation is shown to a template.

    Attributes:
        null_content: a message without content has none, instead of an empty text that can be added to.
        text_arguments: arguments of calls are text, instead of data.
        tool_list: no tools are an empty list, instead of none.
        flat_calls: calls and their results are text of the conversation.
        merged_system: the system message stands at the beginning of the user's first.
    """

    null_content: bool
    text_arguments: bool = False
    tool_list: bool = False
    flat_calls: bool = False
    merged_system: bool = False

    def messages(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Return the conversation in this form."""
        out = with_tool_prompt(messages, ()) if self.flat_calls else list(messages)
        if self.merged_system:
            first, second, *rest = out
            content = f"{first.content or ''}\n\n{second.content or ''}".strip()
            out = [msgspec.structs.replace(second, content=content), *rest]
        return out

    def message(self, message: ChatMessage, role: str) -> dict[str, Any]:
        """Return a message as a template's variable."""
        out: dict[str, Any] = {"role": role, "content": message.content if self.null_content else message.content or ""}
        if message.name is not None:
            out["name"] = message.name
        if message.tool_calls:
            out["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": self._arguments(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            out["tool_call_id"] = message.tool_call_id
        if message.reasoning is not None:
            out |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        return out

    def tools(self, tools: Sequence[FunctionSpec]) -> list[dict[str, Any]] | None:
        """Return the tools as a template's variable."""
        out = [_tool(tool) for tool in tools]
        return out if out or self.tool_list else None

    def _arguments(self, text: str) -> Any:
        """Data where they are an object: most templates write them with `tojson`."""
        if self.text_arguments:
            return text
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return value if isinstance(value, dict) else text


def forms(messages: Sequence[ChatMessage], tools: Sequence[FunctionSpec], usual: Form) -> Iterator[Form]:
    """Yield the usual form, then those others that would make a difference."""
    yield usual
    if any(message.content is None for message in messages):
        yield replace(usual, null_content=not usual.null_content)
    if any(message.tool_calls for message in messages):
        yield replace(usual, text_arguments=True)
    if not tools:
        yield replace(usual, tool_list=True)
    if any(message.tool_calls or message.role == "tool" for message in messages):
        yield replace(usual, flat_calls=True)
    if [message.role for message in messages[:2]] in (["system", "user"], ["developer", "user"]):
        yield replace(usual, merged_system=True)


def drops_calls(rendered: str, messages: Sequence[ChatMessage], tools: Sequence[FunctionSpec]) -> bool:
    """Whether the text leaves out a call that the assistant made: a name stands there less often than it should."""
    wanted = Counter(call.function.name for message in messages for call in message.tool_calls)
    described = {tool.name for tool in tools}
    return any(rendered.count(name) < count + (name in described) for name, count in wanted.items())


def _tool(tool: FunctionSpec) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}
