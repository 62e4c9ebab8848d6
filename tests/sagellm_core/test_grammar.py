"""Structured output: what a grammar allows, what is refused, and that a hostile one costs nothing but itself."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_core.grammar import GrammarConstraint, GrammarLimits, LLGuidanceCompiler
from sagellm_core.grammar_worker import CheckWorker
from sagellm_core.masks import MaskFiller
from sagellm_core.text import load_tokenizer
from sagellm_core.text.bytes_model import EOS, IM_END, IM_START, VOCAB_SIZE, ByteChatModel
from sagellm_core.text.parsing.select import ToolFormat
from sagellm_core.text.tool_prompt import strict_grammar
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnavailableError, UnsupportedError
from sagellm_protocol.generation import FunctionSpec
from sagellm_protocol.sampling import GrammarSpec

_MODEL = ByteChatModel("m", 4096)
_FILLER = MaskFiller(VOCAB_SIZE)


@pytest.fixture(scope="module")
def compiler() -> Iterator[LLGuidanceCompiler]:
    made = LLGuidanceCompiler(lambda: _MODEL.tokenizer, VOCAB_SIZE)
    yield made
    made.close()


def _ready(constraint: GrammarConstraint, seconds: float = 110.0) -> GrammarConstraint:
    deadline = time.monotonic() + seconds
    while not constraint.ready():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)
    return constraint


def _masks(constraint: GrammarConstraint, draft: Sequence[int] = ()) -> np.ndarray:
    """One mask for the next token and one after each token of `draft`, which the grammar allows."""
    masks = _FILLER.begin([(constraint.matcher, draft)])
    masks.wait()
    return masks.rows


def _allowed(mask: np.ndarray) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.nonzero(bits)[0].tolist())


def _accepts(constraint: GrammarConstraint, text: str) -> bool:
    """Whether `text` is a complete output."""
    probe = constraint.fork()
    for byte in text.encode():
        if byte not in _allowed(_masks(probe)[0]):
            return False
        probe.accept(byte)
    return EOS in _allowed(_masks(probe)[0])


def _random_output(constraint: GrammarConstraint, rng: random.Random, most: int = 2000) -> str:
    """Draw allowed bytes until the grammar is satisfied; printable ones while there is a choice."""
    probe = constraint.fork()
    out = bytearray()
    for _ in range(most):
        allowed = _allowed(_masks(probe)[0])
        if EOS in allowed and (len(allowed) <= 2 or rng.random() < 0.3):
            return out.decode()
        chars = sorted(b for b in allowed if 32 <= b < 127) or sorted(b for b in allowed if b < 256)
        quotes = [b for b in chars if chr(b) in '"}],']
        byte = rng.choice(quotes) if quotes and rng.random() < 0.4 else rng.choice(chars)
        out.append(byte)
        probe.accept(byte)
    raise AssertionError(f"no end after {most} bytes: {out[-80:]!r}")


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (GrammarSpec(kind="regex", source="[a-c]{2,3}"), ["ab", "abc"], ["a", "abcd", "xy"]),
        (GrammarSpec(kind="choice", source='["yes", "no", "may \\"be\\"\\n"]'), ["yes", 'may "be"\n'], ["maybe", "yesno"]),
        (GrammarSpec(kind="json_object"), ['{"a": [1, {"b": null}]}', "{}"], ["[]", '{"a"}', "{}x"]),
        (
            GrammarSpec(kind="json_schema", source='{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"],"additionalProperties":false}'),
            ['{"n": 12}', '{"n": -1}'],
            ['{"n": 1.5}', "{}", '{"n": 1, "m": 2}'],
        ),
        (GrammarSpec(kind="json_schema", source='{"enum":[1,"é",null]}'), ["1", '"é"', "null"], ["2", '"e"']),
        (GrammarSpec(kind="lark", source='start: "a" b+\nb: "b" | "c"'), ["ab", "abcb"], ["a", "ba"]),
        (GrammarSpec(kind="lark", source='root ::= "a" item+\nitem ::= [b-c] | "-" [0-9]{2}'), ["ab", "a-42c"], ["a", "a-4"]),
    ],
)  # fmt: skip
def test_each_kind_allows_what_it_says(
    compiler: LLGuidanceCompiler, spec: GrammarSpec, good: list[str], bad: list[str]
) -> None:
    """Complete outputs of every kind are accepted, all others are not."""
    constraint = _ready(compiler.compile(spec))
    assert [text for text in good if not _accepts(constraint, text)] == []
    assert [text for text in bad if _accepts(constraint, text)] == []


@pytest.mark.parametrize(
    ("spec", "fact"),
    [
        (GrammarSpec(kind="json_schema", source="{"), "no JSON"),
        (GrammarSpec(kind="json_schema", source="[" * 100000), "no JSON"),
        (GrammarSpec(kind="json_schema", source="3"), "no object"),
        (GrammarSpec(kind="json_schema", source='{"type":"array","uniqueItems":true}'), "uniqueItems"),
        (GrammarSpec(kind="json_schema", source='{"not":{},"if":{}}'), '"if".*not support|"not".*not support'),
        (GrammarSpec(kind="json_schema", source='{"oneOf":[{"type":"string"},{"maxLength":3}]}'), "anyOf"),
        (GrammarSpec(kind="json_schema", source='{"$ref":"#/nowhere"}'), "nowhere"),
        (GrammarSpec(kind="json_schema", source='{"$ref":"http://127.0.0.1/x"}'), "refused"),
        (GrammarSpec(kind="json_schema", source='{"type":"string","format":"martian"}'), "martian"),
        (GrammarSpec(kind="choice", source="[]"), "choice"),
        (GrammarSpec(kind="choice", source='["a", 1]'), "choice"),
        (GrammarSpec(kind="regex", source="(a"), "regex"),
        (GrammarSpec(kind="lark", source="start: x"), "unknown name"),
        (GrammarSpec(kind="lark", source="root ::= ("), "grammar"),
        (GrammarSpec(kind="regex", source="a" * 300000), "300000 bytes"),
    ],
)
def test_bad_grammars_are_named(compiler: LLGuidanceCompiler, spec: GrammarSpec, fact: str) -> None:
    """A grammar that cannot be compiled fails its own request with what is wrong about it, and is not kept."""
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=fact) as caught:
            _ready(compiler.compile(spec))
        assert caught.value.param == "grammar"
    good = _ready(compiler.compile(GrammarSpec(kind="regex", source="a")))
    assert _accepts(good, "a")


def test_a_grammar_that_takes_too_long_or_too_much_is_killed() -> None:
    """Time and memory limits hold, the worker is replaced, and the next grammar compiles."""
    worker = CheckWorker(timeout_s=0, limit_bytes=2 << 30)
    verdict = worker.check('{"grammars":[{"lark_grammar":"start: /a/"}]}')
    assert verdict.error is not None
    assert "more than 0 s" in verdict.error
    assert worker.pid is None
    worker.close()
    small = CheckWorker(timeout_s=30, limit_bytes=16 << 20)
    verdict = small.check('{"grammars":[{"lark_grammar":"start: /a/"}]}')
    assert verdict.error is not None
    assert "16 MB" in verdict.error
    small.close()
    fine = CheckWorker(timeout_s=30, limit_bytes=2 << 30)
    assert fine.check('{"grammars":[{"lark_grammar":"start: /a/"}]}').error is None
    fine.close()
    fine.close()


def test_an_interrupt_from_the_terminal_passes_the_worker_by(compiler: LLGuidanceCompiler) -> None:
    """The worker leads a session of its own, where a terminal's Ctrl-C does not reach, and ends with its engine's pipe."""
    _ready(compiler.compile(GrammarSpec(kind="regex", source="session")))
    pid = compiler._worker.pid
    assert pid is not None
    assert os.getsid(pid) == pid != os.getsid(0)
    process = compiler._worker._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def test_compiling_survives_a_killed_worker(compiler: LLGuidanceCompiler) -> None:
    """When the worker dies between two grammars, the next one starts another."""
    _ready(compiler.compile(GrammarSpec(kind="regex", source="kill1")))
    first = compiler._worker.pid
    compiler._worker._process.kill()  # type: ignore[union-attr]
    compiler._worker._process.wait()  # type: ignore[union-attr]
    _ready(compiler.compile(GrammarSpec(kind="regex", source="kill2")))
    assert compiler._worker.pid not in (None, first)


def test_kept_grammars_are_bounded_in_bytes() -> None:
    """A grammar is compiled once while it is kept; the least recently used ones give way to the cap."""
    made = LLGuidanceCompiler(lambda: _MODEL.tokenizer, VOCAB_SIZE, GrammarLimits(cache_bytes=300_000))
    specs = [GrammarSpec(kind="regex", source=f"x{i}") for i in range(12)]
    for spec in specs:
        assert _accepts(_ready(made.compile(spec)), spec.source)
        made.compile(specs[0])
        assert made.cached_bytes <= 300_000
    assert specs[0] in made._cache
    assert specs[1] not in made._cache
    assert made.compile(specs[-1]).ready()
    made.close()
    with pytest.raises(UnavailableError):
        made.compile(specs[0])


def test_drafts_are_masked_and_rolled_back(compiler: LLGuidanceCompiler) -> None:
    """A draft counts as far as it fits, each of its tokens has a mask behind it, and the constraint stays where it was."""
    constraint = _ready(compiler.compile(GrammarSpec(kind="regex", source="ab[cd]e?")))
    assert [constraint.allowed(draft) for draft in (b"abcx", b"xb", b"", b"abcee")] == [3, 0, 0, 4]
    masks = _masks(constraint, b"abc")
    assert [sorted(_allowed(m)) for m in masks] == [[97], [98], [99, 100], [101, EOS, IM_END]]
    assert _allowed(_masks(constraint, b"abce")[4]) == {EOS, IM_END}
    assert [sorted(_allowed(m)) for m in _masks(constraint)] == [[97]]
    for byte in b"abce":
        constraint.accept(byte)
    assert constraint.finished
    assert _allowed(_masks(constraint)[0]) == {EOS, IM_END}
    constraint.accept(EOS)


def test_leaving_the_grammar_allows_nothing(compiler: LLGuidanceCompiler) -> None:
    """A sequence that was pushed out of its grammar gets empty masks: it fails, alone."""
    constraint = _ready(compiler.compile(GrammarSpec(kind="regex", source="ab")))
    other = constraint.fork()
    constraint.accept(ord("x"))
    assert _allowed(_masks(constraint)[0]) == set()
    assert _allowed(_masks(other)[0]) == {97}


_SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "string", "maxLength": 8},
            {"type": "integer", "minimum": -9, "maximum": 99},
            {"type": "boolean"},
            {"enum": ["red", "green", 3]},
            {"type": "null"},
            {"type": "string", "pattern": "^[a-z]{1,4}$"},
            {"type": "number", "minimum": 0, "maximum": 1},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda item, n: {"type": "array", "items": item, "minItems": 0, "maxItems": n}, inner, st.integers(1, 3)
        ),
        st.builds(
            lambda props: {
                "type": "object",
                "properties": props,
                "required": list(props),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["name", "x", "größe", "a b", 'q"']), inner, min_size=1, max_size=3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


def valid(schema: dict, value: object) -> bool:
    """Whether `value` is an instance of one of the schemas above."""
    if "anyOf" in schema:
        return any(valid(option, value) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        props = schema["properties"]
        return (
            isinstance(value, dict) and set(value) == set(props) and all(valid(props[k], v) for k, v in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(valid(schema["items"], v) for v in value)
        )
    if kind in ("integer", "number"):
        number = not isinstance(value, bool) and isinstance(value, int if kind == "integer" else int | float)
        return number and schema["minimum"] <= value <= schema["maximum"]  # type: ignore[operator]
    if kind == "string":
        text = isinstance(value, str)
        return text and ("pattern" not in schema or (value.isascii() and value.islower())) and len(value) <= 8  # type: ignore[union-attr, arg-type]
    return isinstance(value, bool) if kind == "boolean" else value is None


@settings(max_examples=60, deadline=None)
@given(schema=_SCHEMAS, seed=st.integers(0, 2**32))
def test_every_output_of_a_schema_is_valid(compiler: LLGuidanceCompiler, schema: dict, seed: int) -> None:
    """Whatever is drawn from the masks of a random schema is an instance of it."""
    constraint = _ready(compiler.compile(GrammarSpec(kind="json_schema", source=json.dumps(schema))))
    text = _random_output(constraint, random.Random(seed))
    assert valid(schema, json.loads(text)), text


def test_a_tokenizer_that_cannot_be_loaded_fails_the_request_only() -> None:
    """An error while loading the tokenizer reaches the request as the error that it is."""

    def broken() -> object:
        raise UnavailableError("gone")

    made = LLGuidanceCompiler(broken, VOCAB_SIZE)  # type: ignore[arg-type]
    with pytest.raises(SageError, match="gone"):
        _ready(made.compile(GrammarSpec(kind="regex", source="a")))
    made.close()


_TOOLS = (
    FunctionSpec(
        name="f",
        strict=True,
        parameters={
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "type": "object",
            "additionalProperties": False,
        },
    ),
    FunctionSpec(name="free"),
)


def test_strict_calls_keep_to_their_schema_and_text_is_free(compiler: LLGuidanceCompiler) -> None:
    """Text without a call is free in every format; a strict call matches its schema, a free one is any object."""
    good, bad = '{"name": "f", "KEY": {"a": 1}}', '{"name": "f", "KEY": {"a": "x"}}'
    free = '{"name": "free", "KEY": {"b": [1]}}'
    forms: list[tuple[ToolFormat, str, str, str]] = [
        ("hermes", "Hm.\n<tool_call>\n", "\n</tool_call>", "arguments"),
        ("llama3", "", "", "parameters"),
    ]
    for form, start, end, key in forms:
        constraint = _ready(compiler.compile(strict_grammar(form, _TOOLS, lambda _: None)))
        for text in ("", "Just text <tool", "a { b"):
            assert _accepts(constraint, text), (form, text)
        for call, fits in ((good, True), (free, True), (bad, False), ("{}", False)):
            assert _accepts(constraint, start + call.replace("KEY", key) + end) is fits, (form, call)
    listed = _ready(compiler.compile(strict_grammar("mistral", _TOOLS, lambda _: IM_START)))
    probe = listed.fork()
    for token in [*b"ok", IM_START, *b'[{"name": "f", "arguments": {"a": ']:
        assert token in _allowed(_masks(probe)[0])
        probe.accept(token)
    assert ord("x") not in _allowed(_masks(probe)[0])
    with pytest.raises(UnsupportedError) as caught:
        strict_grammar("gemma4", _TOOLS, lambda _: None)
    assert caught.value.param == "tools"


@pytest.mark.model
def test_real_vocabulary_masks_are_fast(default_model_path: Path) -> None:
    """On a 49k vocabulary tokens follow the grammar, the end is the model's, and a mask takes about a millisecond at most."""
    tokenizer = load_tokenizer(default_model_path)
    made = LLGuidanceCompiler(lambda: tokenizer, 49152)
    filler = MaskFiller(49152)
    schema = '{"type":"object","properties":{"city":{"type":"string"},"n":{"type":"integer"}},"required":["city","n"],"additionalProperties":false}'
    constraint = _ready(made.compile(GrammarSpec(kind="json_schema", source=schema)))
    times = []
    for token in tokenizer.encode('{"city": "San José", "n": 42}', add_special_tokens=False):
        start = time.process_time()
        masks = filler.begin([(constraint.matcher, ())])
        masks.wait()
        times.append(time.process_time() - start)
        (mask,) = masks.rows
        assert mask.shape == (1536,)
        assert token in _allowed(mask)
        constraint.accept(token)
    masks = filler.begin([(constraint.matcher, ())])
    masks.wait()
    assert _allowed(masks.rows[0]) == set(tokenizer.info.eos_token_ids)
    assert constraint.finished
    filler.close()
    assert sorted(times)[len(times) // 2] < 0.003
    made.close()


def test_importing_the_hook_loads_no_grammar_library() -> None:
    """Llguidance is loaded with the first grammar, not before."""
    import subprocess

    code = "import sys; import sagellm_core.grammar; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
