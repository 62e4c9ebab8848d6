"""Requests with tools and reasoning: what the model is shown, what it is held to, how its answer is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sagellm_core.text import TextChatModel, load_chat_model
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_core.text.parsing.select import reasoning_marks, tool_format
from sagellm_core.text.tool_prompt import call_grammar
from sagellm_protocol.engine import TokenDelta
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import ChatMessage, FunctionCall, FunctionSpec, GenerationRequest, ToolCall
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

_WEATHER = FunctionSpec(
    name="weather",
    description="Tells the weather <|im_end|>",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
_CLOCK = FunctionSpec(name="clock")
_HERMES = (
    "{%- if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools> use <tool_call><|im_end|>\n"
    "{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def _request(**changes: Any) -> GenerationRequest:
    messages = (ChatMessage(role="user", content="hi"),)
    return GenerationRequest(
        **{"request_id": "r", "model": "m", "messages": messages, "tools": (_WEATHER, _CLOCK)} | changes
    )


def _answer(
    model: TextChatModel, request: GenerationRequest, text: str, reason: str = "stop"
) -> tuple[str, str, list, str | None]:
    decoder = model.decoder(model.prepare(request), 0)
    content = thoughts = ""
    calls: list[list[str]] = []
    end = None
    ids = model.tokenize(text, add_special_tokens=False, parse_special=True)
    for delta in [
        *(TokenDelta(request_id="r", token_ids=(i,)) for i in ids),
        TokenDelta(request_id="r", finish_reason=reason),
    ]:
        out = decoder.push(delta)
        if out is None:
            continue
        content, thoughts, end = content + out.text, thoughts + out.reasoning, out.finish_reason
        for call in out.tool_calls:
            if call.name is not None:
                calls.append([call.name, ""])
            calls[call.index][1] += call.arguments
    return content, thoughts, calls, end


@pytest.fixture
def hermes(write_vocabulary: Callable[..., Path], tmp_path: Path) -> TextChatModel:
    """A model whose template knows tools."""
    path = write_vocabulary(tokenizer__chat_template=_HERMES, llama__context_length=4096)
    return load_chat_model(path, "hermes", cache_dir=tmp_path / "cache")


@pytest.fixture
def plain(write_vocabulary: Callable[..., Path], tmp_path: Path) -> TextChatModel:
    """A model whose template knows no tools."""
    return load_chat_model(write_vocabulary(llama__context_length=4096), "plain", cache_dir=tmp_path / "cache")


def test_tools_go_into_the_template(hermes: TextChatModel) -> None:
    """The template gets the tools as data, their text brings in no control tokens, and calls come out parsed."""
    ids = hermes.prepare(_request()).engine_requests[0].prompt_token_ids
    text = hermes.detokenize(ids)
    assert '"name": "weather", "description": "Tells the weather <|im_end|>"' in text
    assert ids.count(2) == 2
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert _answer(hermes, _request(), f"One moment.\n{call}") == (
        "One moment.",
        "",
        [["weather", '{"city": "Oslo"}']],
        "tool_calls",
    )
    assert _answer(hermes, _request(), "It rains.") == ("It rains.", "", [], "stop")
    assert _answer(hermes, _request(), '<tool_call>{"name": "clock", "argu', "length")[2:] == (
        [["clock", ""]],
        "length",
    )


def test_tools_are_described_where_the_template_knows_none(plain: TextChatModel) -> None:
    """A template without tools gets them in the system message, earlier calls and results as text."""
    call = ToolCall(id="c", function=FunctionCall(name="clock", arguments='{"zone": "UTC"}'))
    messages = (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="What time is it?"),
        ChatMessage(role="assistant", tool_calls=(call,)),
        ChatMessage(role="tool", content="12:00", tool_call_id="c"),
        ChatMessage(role="tool", content="13:00", tool_call_id="d"),
    )
    text = plain.detokenize(plain.prepare(_request(messages=messages)).engine_requests[0].prompt_token_ids)
    assert "<|im_start|>system\nBe brief.\n\nYou can call functions" in text
    assert '{"name": "clock", "parameters": {"type": "object", "properties": {}}}\n</tools>' in text
    assert '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>' in text
    results = "<tool_response>\n12:00\n</tool_response>\n<tool_response>\n13:00\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text
    for answer in (
        '<tool_call>{"name": "clock"}</tool_call>',
        '```json\n{"name": "clock", "arguments": {}}\n```',
        '{"name": "clock"}',
    ):
        assert _answer(plain, _request(), answer)[2:] == ([["clock", "{}"]], "tool_calls")
    assert _answer(plain, _request(), '{"name": "Bob"}') == ('{"name": "Bob"}', "", [], "stop")


def test_no_tools_without_a_choice_for_them(plain: TextChatModel) -> None:
    """tool_choice none shows no tools and reads no calls."""
    request = _request(tool_choice="none")
    text = plain.detokenize(plain.prepare(request).engine_requests[0].prompt_token_ids)
    assert "clock" not in text
    call = '<tool_call>{"name": "clock"}</tool_call>'
    assert _answer(plain, request, call) == (call, "", [], "stop")


@pytest.mark.parametrize(("choice", "names"), [("required", ["weather", "clock"]), ("clock", ["clock"])])
def test_a_forced_call_is_held_to_a_grammar(hermes: TextChatModel, choice: str, names: list[str]) -> None:
    """Required and a named tool give a grammar of their calls, and the JSON is read as a call."""
    grammar = hermes.prepare(_request(tool_choice=choice)).engine_requests[0].sampling.grammar
    assert grammar is not None
    schema = json.loads(grammar.source)
    options = schema.get("anyOf", [schema])
    assert [option["properties"]["name"]["const"] for option in options] == names
    answer = _answer(hermes, _request(tool_choice=choice), '{"name": "clock", "arguments": {"a": 1}}')
    assert answer == ("", "", [["clock", '{"a": 1}']], "tool_calls")


def test_references_in_parameters_still_hold() -> None:
    """References inside of a tool's schema point to where it stands in the grammar's schema."""
    parameters = {"$defs": {"p": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/p"}, "y": {"$ref": "#"}}}
    tools = [FunctionSpec(name="a", parameters=parameters), FunctionSpec(name="b", parameters=parameters)]
    one = json.loads(call_grammar(tools[:1]).source)
    assert one["properties"]["arguments"]["properties"]["x"]["$ref"] == "#/properties/arguments/$defs/p"
    two = json.loads(call_grammar(tools).source)
    moved = two["anyOf"][1]["properties"]["arguments"]["properties"]
    assert moved["x"]["$ref"] == "#/anyOf/1/properties/arguments/$defs/p"
    assert moved["y"]["$ref"] == "#/anyOf/1/properties/arguments"


def test_strict_tools_are_held_to_their_schema(hermes: TextChatModel) -> None:
    """A strict tool brings a grammar also where the model may choose; a grammar of the request's own excludes it."""
    strict = (msgspec.structs.replace(_WEATHER, strict=True),)
    grammar = hermes.prepare(_request(tools=strict)).engine_requests[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "lark"
    assert hermes.prepare(_request()).engine_requests[0].sampling.grammar is None
    own = SamplingParams(grammar=GrammarSpec(kind="json_object"))
    with pytest.raises(InvalidArgumentError, match="exclude"):
        hermes.prepare(_request(tools=strict, sampling=own))
    assert _answer(hermes, _request(sampling=own), '{"name": "clock"}') == ('{"name": "clock"}', "", [], "stop")


def test_one_call_where_one_is_allowed(plain: TextChatModel) -> None:
    """Without parallel calls the answer ends when a second call begins."""
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    assert _answer(plain, _request(parallel_tool_calls=False), call * 2)[2:] == ([["clock", "{}"]], "tool_calls")
    assert len(_answer(plain, _request(), call * 2)[2]) == 2


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": "nope"}, "tool_choice"),
        ({"tool_choice": "required", "tools": ()}, "tool_choice"),
        (
            {"tool_choice": "required", "sampling": SamplingParams(grammar=GrammarSpec(kind="json_object"))},
            "tool_choice",
        ),
        ({"reasoning": True}, "reasoning"),
        ({"messages": None, "prompt": "x"}, "tools"),
    ],
)
def test_wrong_combinations_name_the_field(plain: TextChatModel, changes: dict[str, Any], param: str) -> None:
    """A choice without its tool, two grammars, and reasoning that a model lacks are refused by name."""
    with pytest.raises(InvalidArgumentError) as caught:
        plain.prepare(_request(**changes))
    assert caught.value.param == param


def test_the_mock_calls_tools_and_reasons() -> None:
    """The mock's answers are read like those of a model that was trained on tools and reasoning, and its prompt keeps the roles."""
    model = ByteChatModel("mock", 4096)
    call = ToolCall(id="c", function=FunctionCall(name="clock", arguments='{"a": 1}'))
    messages = (
        ChatMessage(role="assistant", tool_calls=(call,), reasoning="hm"),
        ChatMessage(role="tool", content="12:00", tool_call_id="c"),
    )
    text = model.detokenize(model.prepare(_request(messages=messages)).engine_requests[0].prompt_token_ids)
    assert (
        '<think>\nhm\n</think>\n\n\n<tool_call>\n{"name": "clock", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
        in text
    )
    assert text.endswith("<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n")
    answer = '<think>\nso\n</think>\n\nOk <tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert _answer(model, _request(), answer) == ("Ok", "so", [["clock", "{}"]], "tool_calls")
    assert _answer(model, _request(tools=(), reasoning=False), "<think>\nso\n</think>\n\nOk")[:2] == ("Ok", "so")


_SWITCH = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
_ALWAYS = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n{{ '<think>\n' }}"


@pytest.fixture
def thinker(write_vocabulary: Callable[..., Path], tmp_path: Path) -> Callable[[str], TextChatModel]:
    """A model with a given template that reasons."""

    def make(template: str) -> TextChatModel:
        return load_chat_model(write_vocabulary(tokenizer__chat_template=template), "t", cache_dir=tmp_path / "cache")

    return make


def test_reasoning_is_read_and_switched(thinker: Callable[[str], TextChatModel]) -> None:
    """Reasoning is split off by default, and switched off through the template."""
    model = thinker(_SWITCH)
    request = _request(tools=())
    assert _answer(model, request, "<think>\nhm\n</think>\n\nYes.") == ("Yes.", "hm", [], "stop")
    off = _request(tools=(), reasoning=False)
    assert model.detokenize(model.prepare(off).engine_requests[0].prompt_token_ids).endswith("<think>\n\n</think>\n\n")
    assert _answer(model, off, "Yes.") == ("Yes.", "", [], "stop")


def test_reasoning_that_the_prompt_opens(thinker: Callable[[str], TextChatModel]) -> None:
    """Where the prompt ends with the mark the answer begins with reasoning; a grammar or a wish closes it first."""
    model = thinker(_ALWAYS)
    request = _request(tools=())
    assert _answer(model, request, "hm</think>Yes.") == ("Yes.", "hm", [], "stop")
    constrained = _request(tools=(), sampling=SamplingParams(grammar=GrammarSpec(kind="json_object")))
    for asked in (constrained, _request(tools=(), reasoning=False)):
        assert model.detokenize(model.prepare(asked).engine_requests[0].prompt_token_ids).endswith(
            "<think>\n</think>\n\n"
        )
        assert _answer(model, asked, "{}") == ("{}", "", [], "stop")
    with pytest.raises(UnsupportedError, match="reasoning"):
        model.prepare(_request(tools=(), reasoning=True, sampling=constrained.sampling))


@pytest.mark.parametrize(
    ("template", "tokens", "form"),
    [
        ("<tool_call> tools", ["<tool_call>"], "hermes"),
        ("<tool_call> <function=f> tools", ["<tool_call>"], "xml"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", ["[TOOL_CALLS]"], "mistral"),
        ("tools", ["<|python_tag|>"], "llama3"),
        ("<|start_header_id|> tools", [], "llama3"),
        ("tools <|tool_call|>", [], "granite"),
        ("tools", ["<start_function_call>"], "function-gemma"),
        ("tools", ["<|tool_call>"], "gemma4"),
        ("tools", [], "generic"),
    ],
)
def test_formats_are_told_by_their_signs(template: str, tokens: list[str], form: str) -> None:
    """The template and the control tokens tell in which format a model calls functions."""
    assert tool_format(template, tokens) == form


def test_reasoning_marks_are_told_by_their_signs() -> None:
    """Marks are found in the template or in the vocabulary."""
    assert reasoning_marks("x </think> y", []) == ("<think>", "</think>")
    assert reasoning_marks("", ["[THINK]"]) == ("[THINK]", "[/THINK]")
    assert reasoning_marks("plain", ["<s>"]) is None


def test_control_tokens_that_a_parser_needs_are_shown(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """A format whose marks are control tokens sees them; without tools they are no text."""
    template = "{{ tools }}{{ messages[0].content }}[TOOL_CALLS]"
    path = write_vocabulary(tokenizer__chat_template=template, llama__context_length=4096)
    model = load_chat_model(path, "m", cache_dir=tmp_path / "cache")
    assert _answer(model, _request(), '[TOOL_CALLS][{"name": "clock", "arguments": {}}]')[2] == [["clock", "{}"]]
    assert _answer(model, _request(tools=()), "a[INST]b")[0] == "ab"
