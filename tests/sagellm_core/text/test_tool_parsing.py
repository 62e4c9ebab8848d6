"""Tool calls: every format, arguments that stream, text that only looks like a call, any cut of the stream."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core.text.parsing.base import CallLog, Output, OutputParser, PlainText, call_id, mistral_call_id
from sagellm_core.text.parsing.reasoning import ReasoningParser
from sagellm_core.text.parsing.tools import BareJson, FunctionBlocks, ListedJson, TaggedJson, parse_block, parse_tags
from sagellm_protocol.generation import FunctionSpec

_NAMES = ("get", "put")
_TOOLS = (
    FunctionSpec(
        name="get",
        parameters={"properties": {"n": {"type": "integer"}, "s": {"type": "string"}, "o": {"type": "object"}}},
    ),
)


def _generic() -> OutputParser:
    log = CallLog()
    return BareJson(log, _NAMES, ("```json", "```"), TaggedJson(log))


_FORMATS: dict[str, Callable[[], OutputParser]] = {
    "tagged": lambda: TaggedJson(CallLog()),
    "bare": lambda: BareJson(CallLog(), _NAMES, ("<|python_tag|>", "```json", "```")),
    "generic": _generic,
    "listed": lambda: ListedJson(CallLog(), "[TOOL_CALLS]"),
    "ended": lambda: ListedJson(CallLog(), "<|tool_call|>", "<|/tool_call|>"),
    "blocks": lambda: FunctionBlocks(
        CallLog(), "<start_function_call>", "<end_function_call>", lambda block: parse_block(block, "<escape>")
    ),
    "xml": lambda: FunctionBlocks(CallLog(), "<tool_call>", "</tool_call>", lambda block: parse_tags(block, _TOOLS)),
    "thinking": lambda: ReasoningParser("<think>", "</think>", TaggedJson(CallLog()), opened=False),
    "opened": lambda: ReasoningParser("<think>", "</think>", PlainText(), opened=True),
}


def _parse(make: Callable[[], OutputParser], pieces: list[str]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Text, reasoning and (name, arguments) of each call; checks what every stream of deltas must keep to."""
    parser = make()
    text = reasoning = ""
    calls: list[list[Any]] = []
    for piece in [*pieces, None]:
        out = Output()
        if piece is None:
            parser.finish(out)
        else:
            parser.push(piece, out)
        text, reasoning = text + out.text, reasoning + out.reasoning
        for delta in out.calls:
            if delta.name is not None:
                assert delta.id
                assert delta.index == len(calls)
                calls.append([delta.name, delta.arguments])
            else:
                assert delta.id is None
                assert delta.index == len(calls) - 1
                calls[-1][1] += delta.arguments
    return text, reasoning, [(name, arguments) for name, arguments in calls]


_ARGS = '{"city": "Zürich } \\" {", "days": [1, {"x": "]"}]}'
_CALL = '{"name": "get", "arguments": ' + _ARGS + "}"


@pytest.mark.parametrize(
    ("form", "source", "text", "calls"),
    [
        ("tagged", f"<tool_call>\n{_CALL}\n</tool_call>", "", [("get", _ARGS)]),
        ("tagged", f"Let me see. \n<tool_call>{_CALL}</tool_call>\n<tool_call>{_CALL}</tool_call>\n", "Let me see.", [("get", _ARGS)] * 2),
        ("tagged", '<tool_call>{"arguments": {"a": 1}, "name": "put"}</tool_call> done', "done", [("put", '{"a": 1}')]),
        ("tagged", '<tool_call>{"name": "put"}</tool_call>', "", [("put", "{}")]),
        ("tagged", '<tool_call>{"name": "put", "arguments": null}</tool_call>', "", [("put", "{}")]),
        ("tagged", '<tool_call>{"name": "put", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("put", '{"a": 1}')]),
        ("tagged", '<tool_call>{"id": 7, "type": "function", "name": "p\\u0075t", "parameters": {}, "ok": true}</tool_call>', "", [("put", "{}")]),
        ("tagged", "a < b <tool_cal x", "a < b <tool_cal x", []),
        ("tagged", "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ("tagged", '<tool_call>{"nam', '<tool_call>{"nam', []),
        ("tagged", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("tagged", '<tool_call>{"name": "get", "arguments": {"a": "cut sho', "", [("get", '{"a": "cut sho')]),
        ("tagged", "  plain \n", "  plain \n", []),
        ("bare", _CALL, "", [("get", _ARGS)]),
        ("bare", '\n<|python_tag|>{"name": "get", "parameters": {}}', "", [("get", "{}")]),
        ("bare", f"{_CALL}; {_CALL}", "", [("get", _ARGS)] * 2),
        ("bare", f"[{_CALL}, {_CALL}]", "", [("get", _ARGS)] * 2),
        ("bare", f"```json\n{_CALL}\n```\n", "", [("get", _ARGS)]),
        ("bare", '{"name": "Bob", "age": 5} is he', '{"name": "Bob", "age": 5} is he', []),
        ("bare", ' {"answer": [1, 2]}', ' {"answer": [1, 2]}', []),
        ("bare", "[1, 2] and more", "[1, 2] and more", []),
        ("bare", "``` x", "``` x", []),
        ("bare", f"I call {_CALL}", f"I call {_CALL}", []),
        ("bare", f"{_CALL} so it is", "so it is", [("get", _ARGS)]),
        ("bare", " \n", " \n", []),
        ("generic", f"Sure: <tool_call>{_CALL}</tool_call>", "Sure:", [("get", _ARGS)]),
        ("generic", _CALL, "", [("get", _ARGS)]),
        ("listed", f"[TOOL_CALLS] [{_CALL}, {_CALL}]", "", [("get", _ARGS)] * 2),
        ("listed", f"[TOOL_CALLS]get[ARGS]{_ARGS}[TOOL_CALLS]put{{}}", "", [("get", _ARGS), ("put", "{}")]),
        ("listed", f"[TOOL_CALLS]get[CALL_ID]abc[ARGS]{_ARGS}", "", [("get", _ARGS)]),
        ("listed", f"Well. [TOOL_CALLS]{_CALL} ok", "Well.ok", [("get", _ARGS)]),
        ("listed", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
        ("listed", "[TOOL_CALLS] [{1}]", "[TOOL_CALLS][{1}]", []),
        ("listed", "[TOOL", "[TOOL", []),
        ("ended", f"<|tool_call|>{_CALL}<|/tool_call|><|tool_call|>[{_CALL}]<|/tool_call|> ok", "ok", [("get", _ARGS)] * 2),
        (
            "blocks",
            "Ok <start_function_call>call:get{city:<escape>Zürich, {x}<escape>,n:3,deep:{list:[1,<escape>b<escape>],ok:true}}<end_function_call>",
            "Ok",
            [("get", '{"city": "Zürich, {x}", "n": 3, "deep": {"list": [1, "b"], "ok": true}}')],
        ),
        ("blocks", "<start_function_call>call:put{}<end_function_call>", "", [("put", "{}")]),
        ("blocks", "<start_function_call>nonsense<end_function_call>!", "<start_function_call>nonsense<end_function_call>!", []),
        ("blocks", "<start_function_call>call:put{a", "<start_function_call>call:put{a", []),
        (
            "xml",
            'So:\n<tool_call>\n<function=get>\n<parameter=n>\n5\n</parameter>\n<parameter=s>\n5\n6 < 7\n</parameter>\n'
            '<parameter=o>{"a": [1]}</parameter>\n<parameter=x>1</parameter>\n</function>\n</tool_call>',
            "So:",
            [("get", '{"n": 5, "s": "5\\n6 < 7", "o": {"a": [1]}, "x": "1"}')],
        ),
        ("xml", "<tool_call><function=put></function></tool_call>", "", [("put", "{}")]),
        ("xml", "<tool_call><function=put>junk</function></tool_call>", "<tool_call><function=put>junk</function></tool_call>", []),
        ("thinking", f"<think>\nwhy <tool_call>\n</think>\n\n<tool_call>{_CALL}</tool_call>", "", [("get", _ARGS)]),
    ],
)  # fmt: skip
def test_calls_and_text(form: str, source: str, text: str, calls: list[tuple[str, str]]) -> None:
    """Each format gives the calls that are in it, and all the rest as text; the result is the same one character at a time."""
    whole = _parse(_FORMATS[form], [source])
    assert (whole[0], whole[2]) == (text, calls)
    assert _parse(_FORMATS[form], list(source)) == whole


@pytest.mark.parametrize(
    ("form", "source", "reasoning", "text"),
    [
        ("thinking", "<think>\nhm\n  so\n</think>\n\nYes.", "hm\n  so", "Yes."),
        ("thinking", "\n <think>hm</think>Yes <think>", "hm", "Yes <think>"),
        ("thinking", "<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("thinking", "Yes, <think> is a tag </think>", "", "Yes, <think> is a tag </think>"),
        ("thinking", "<think>never ends </thin", "never ends </thin", ""),
        ("thinking", "<thin", "", "<thin"),
        ("thinking", " <b> ", "", " <b> "),
        ("opened", "\nhm</think>\n\n Yes. ", "hm", "Yes. "),
        ("opened", "no end", "no end", ""),
    ],
)
def test_reasoning_is_split_off(form: str, source: str, reasoning: str, text: str) -> None:
    """Reasoning at the beginning is split off without its layout; the same marks later are text."""
    for pieces in ([source], list(source)):
        got = _parse(_FORMATS[form], pieces)
        assert (got[1], got[0]) == (reasoning, text)


_TOKENS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<start_function_call>", "<end_function_call>",
    "<escape>", "<|python_tag|>", "<|tool_call|>", "<|/tool_call|>", "```json", "```", "call:get{a:1}", "<function=get>", "</function>", "<parameter=n>", "</parameter>", '{"name": "get"', '"arguments": ', '{"a": "b\\""}', "}", "{", "[", "]",
    ", ", ";", "\n", " ", '"', "\\", "get", "text", "null", ":", "é", "<", "[T",
]  # fmt: skip


@given(
    form=st.sampled_from(sorted(_FORMATS)),
    parts=st.lists(st.one_of(st.sampled_from(_TOKENS), st.text(max_size=3))),
    cuts=st.lists(st.integers(0, 120)),
)
def test_the_cut_does_not_matter(form: str, parts: list[str], cuts: list[int]) -> None:
    """Any text, valid or not, gives the same output however it is cut, and no parser raises."""
    source = "".join(parts)
    edges = [0, *sorted(min(c, len(source)) for c in cuts), len(source)]
    pieces = [source[a:b] for a, b in itertools.pairwise(edges)]
    assert _parse(_FORMATS[form], pieces) == _parse(_FORMATS[form], [source])


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.text(), _JSON, max_size=3), indent=st.sampled_from([None, 2]), ascii_only=st.booleans()
)
def test_arguments_survive_every_json_format(arguments: dict, indent: int | None, ascii_only: bool) -> None:
    """Any arguments, written in any JSON layout, come out as the same data."""
    call = json.dumps({"name": "get", "arguments": arguments}, indent=indent, ensure_ascii=ascii_only)
    for form, source in (
        ("tagged", f"<tool_call>{call}</tool_call>"),
        ("bare", call),
        ("listed", f"[TOOL_CALLS][{call}]"),
    ):
        _, _, calls = _parse(_FORMATS[form], [source])
        assert [name for name, _ in calls] == ["get"]
        assert json.loads(calls[0][1]) == arguments


def test_arguments_stream() -> None:
    """Arguments come out as they come in, not at the end of the call."""
    parser = TaggedJson(CallLog())
    out = Output()
    parser.push('<tool_call>{"name": "get", "arguments": {"text": "Once upon', out)
    assert [(c.name, c.arguments) for c in out.calls] == [("get", '{"text": "Once upon')]


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(_FORMATS))
@pytest.mark.parametrize("unit", ["<tool_call", " ", "{", '{"a": "', "\\"])
def test_parsing_takes_linear_time(form: str, unit: str) -> None:
    """Four times the text, one character at a time, takes about four times as long, whatever the text."""

    def seconds(count: int) -> float:
        pieces = list(unit * count)
        start = time.thread_time()
        _parse(_FORMATS[form], pieces)
        return time.thread_time() - start

    size = 3000 // len(unit)
    seconds(size // 4)
    assert min(seconds(size * 4) for _ in range(2)) < 16 * min(seconds(size) for _ in range(3)) + 0.03


def test_ids_are_unique_and_shaped() -> None:
    """Call ids do not repeat; mistral's have nine letters and digits."""
    assert len({call_id() for _ in range(100)}) == 100
    assert all(len(i) == 9 and i.isalnum() for i in (mistral_call_id() for _ in range(100)))


def test_deep_blocks_are_refused() -> None:
    """A block nested without end is text, not a crash."""
    assert parse_block("call:f" + "{a:" * 5000 + "1" + "}" * 5000, "<escape>") is None
