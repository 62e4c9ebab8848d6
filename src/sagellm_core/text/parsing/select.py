"""Which parsers a model's output needs: told by its template and its control tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from sagellm_core.text.parsing.base import CallLog, OutputParser, PlainText, mistral_call_id
from sagellm_core.text.parsing.reasoning import ReasoningParser
from sagellm_core.text.parsing.tools import BareJson, FunctionBlocks, ListedJson, TaggedJson, parse_block, parse_tags
from sagellm_protocol.generation import FunctionSpec

__all__ = ["ParserPlan", "ToolFormat", "reasoning_marks", "tool_format"]

ToolFormat = Literal[
    "none", "forced", "hermes", "llama3", "mistral", "granite", "function-gemma", "gemma4", "xml", "generic"
]

_FENCES = ("```json", "```")
_BLOCKS = {
    "function-gemma": ("<start_function_call>", "<end_function_call>", "<escape>"),
    "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>'),
}
_SHOWN: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "xml": ("<tool_call>", "</tool_call>"),
    "generic": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "granite": ("<|tool_call|>", "<|/tool_call|>"),
    "function-gemma": _BLOCKS["function-gemma"],
    "gemma4": _BLOCKS["gemma4"],
}
_SIGNS: tuple[tuple[ToolFormat, str, bool], ...] = (
    ("function-gemma", "<start_function_call>", True),
    ("gemma4", "<|tool_call>", True),
    ("granite", "<|tool_call|>", True),
    ("mistral", "[TOOL_CALLS]", False),
    ("xml", "<function=", False),
    ("hermes", "<tool_call>", False),
    ("llama3", "<|python_tag|>", True),
    ("llama3", "<|start_header_id|>", False),
)
"""Format, a string that tells it, and whether that string may also stand in the vocabulary only; the first one counts."""
_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("Here is my thought process:", "Here is my response:"),
)


def tool_format(template: str, tokens: Collection[str]) -> ToolFormat:
    """Return the format in which a model with this template and these control tokens calls functions."""
    for form, mark, in_tokens in _SIGNS:
        if mark in template or (in_tokens and mark in tokens):
            return form
    return "generic"


def reasoning_marks(template: str, tokens: Collection[str]) -> tuple[str, str] | None:
    """Return the marks around a model's reasoning, None if it has none."""
    for start, end in _REASONING:
        if start in template or end in template or start in tokens:
            return start, end
    return None


@dataclass(frozen=True, slots=True)
class ParserPlan:
    """How the output of one request is read.

    Attributes:
        tools: format of calls; ``forced`` is plain JSON, made by a grammar.
        specs: the request's tools.
        reasoning: marks around reasoning, or None.
        opened: the prompt ends with the first of them.
        parallel: whether more than one call is allowed.
    """

    tools: ToolFormat = "none"
    specs: tuple[FunctionSpec, ...] = ()
    reasoning: tuple[str, str] | None = None
    opened: bool = False
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the request's tools."""
        return frozenset(tool.name for tool in self.specs)

    @property
    def shown(self) -> tuple[str, ...]:
        """Control tokens that a parser must see as text."""
        return (*_SHOWN.get(self.tools, ()), *(self.reasoning or ()))

    def log(self) -> CallLog:
        """Return the counter of calls of one choice."""
        return CallLog(mistral_call_id) if self.tools == "mistral" else CallLog()

    def build(self, calls: CallLog) -> OutputParser:
        """Return a fresh parser."""
        inner = self._tools(calls)
        if self.reasoning is None:
            return inner
        return ReasoningParser(*self.reasoning, inner, opened=self.opened)

    def _tools(self, calls: CallLog) -> OutputParser:
        if self.tools in _BLOCKS:
            start, end, quote = _BLOCKS[self.tools]
            return FunctionBlocks(calls, start, end, lambda block: parse_block(block, quote))
        make: dict[str, Callable[[], OutputParser]] = {
            "none": PlainText,
            "forced": lambda: BareJson(calls, self.names),
            "hermes": lambda: TaggedJson(calls),
            "xml": lambda: FunctionBlocks(
                calls, "<tool_call>", "</tool_call>", lambda block: parse_tags(block, self.specs)
            ),
            "llama3": lambda: BareJson(calls, self.names, ("<|python_tag|>", *_FENCES)),
            "mistral": lambda: ListedJson(calls, "[TOOL_CALLS]"),
            "granite": lambda: ListedJson(calls, "<|tool_call|>", "<|/tool_call|>"),
            "generic": lambda: BareJson(calls, self.names, _FENCES, TaggedJson(calls)),
        }
        return make[self.tools]()
