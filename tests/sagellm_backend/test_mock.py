"""The simulated device: the kit's rules on blocks, batches and draws, readable text, scripts."""

import re

import msgspec
import numpy as np
import pytest

from sagellm_backend import conformance
from sagellm_backend.base import LoadOptions
from sagellm_backend.conformance import Kit
from sagellm_backend.conformance_specs import SPECS
from sagellm_backend.mock import _PHRASES, BYTE_VOCAB, Latency, MockBackend, mock_spec
from sagellm_backend.mock_script import Script, load_script
from sagellm_backend.tensors import EMPTY
from sagellm_core.local import LocalEngine
from sagellm_core.testing import collect, mock_engine
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import EngineDiedError, ErrorCode, InvalidArgumentError, UnsupportedError
from sagellm_protocol.sampling import SamplingParams

KIT = Kit(MockBackend(), specs={"llama": SPECS["llama"]})
CHECKS = (
    conformance.chunking_does_not_matter,
    conformance.batch_does_not_matter,
    conformance.blocks_may_lie_anywhere,
    conformance.blocks_copy_and_travel,
    conformance.blocks_refuse_bad_content,
    conformance.masks_may_come_late,
    conformance.batches_are_checked,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    """The part of the kit that is not about arithmetic holds for the simulated device."""
    check(KIT)


def request(prompt, name="r", *, chat=True, emitted=b"", **sampling):
    ids = tuple(prompt)
    if chat:
        ids = (256, *say("user", prompt), 258, *b"assistant\n")
    how = {"temperature": 1.0, "seed": 0, "max_tokens": 400, **sampling}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=ids,
        emitted_token_ids=tuple(emitted),
        eos_token_ids=(257, 259),
        sampling=SamplingParams(**how),
    )


def say(role, text):
    return (258, *role.encode(), 10, *text, 259, 10)


def reply(engine, prompt, **how):
    return collect(engine, [request(prompt, **how)])["r"]


def test_text_is_phrases_and_ends_by_itself():
    """Greedy text is made of plain phrases in sentences, and the reply ends with the chat's end token."""
    out = reply(mock_engine(), b"Tell me.", temperature=0.0, max_tokens=2000)
    assert out.finish_reason == "stop"
    assert out.deltas[-1].stop_token_id == 259
    assert out.text.endswith(".")
    assert {phrase.strip(" ,.") for phrase in re.split("[,.]", out.text)} <= {*_PHRASES, ""}


def test_text_depends_on_every_token_of_the_prompt():
    """One other byte far back gives another text."""
    texts = {reply(mock_engine(), b"x" * 50 + bytes([65 + i]) + b"y" * 200, temperature=0.0).text for i in range(8)}
    assert len(texts) == 8


def test_seeds_give_different_texts():
    """Sampling at temperature 1 varies the words."""
    texts = {reply(mock_engine(), b"Hi", seed=seed).text for seed in range(6)}
    assert len(texts) > 3


def test_a_precision_is_refused():
    """The device has none."""
    with pytest.raises(UnsupportedError):
        MockBackend().load(mock_spec(), EMPTY, LoadOptions(n_blocks=4, quant="q4"))


def test_latency_is_base_plus_rows_plus_sequences():
    """Decode rows cost their sequence, chunk rows cost each."""
    assert Latency(1.0, 0.1, 0.01).of(np.array([1, 10, 1])) == pytest.approx(1.0 + 1.0 + 0.03)


def test_any_vocabulary_works():
    """With a real model's sizes ids are drawn from all of its vocabulary."""
    spec = msgspec.structs.replace(mock_spec(), vocab_size=50000)
    assert spec.vocab_size != BYTE_VOCAB
    kit = Kit(MockBackend(), specs={"llama": spec})
    conformance.batch_does_not_matter(kit)


SCRIPT = msgspec.convert(
    {
        "rules": [
            {
                "contains": "weather",
                "role": "user",
                "reply": [{"think": "I look."}, {"tool": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
            },
            {"role": "tool", "reply": [{"say": "It is 18 °C."}]},
            {"contains": "slow", "reply": [{"drip_ms": 2}, {"say": "slowly"}]},
            {"contains": "deny", "reply": [{"say": "Well"}, {"fail": "resource_exhausted"}]},
            {"contains": "die", "reply": [{"say": "Good"}, {"crash": "engine"}, {"say": "bye"}]},
            {"contains": "choose", "choices": [[{"say": "red"}], [{"say": "blue"}]]},
        ]
    },
    Script,
)


def scripted(**how):
    return mock_engine(script=SCRIPT, **how)


def test_a_script_thinks_and_calls_a_tool():
    """Thoughts and calls are written as a model writes them."""
    out = reply(scripted(), b"How is the weather?")
    assert out.finish_reason == "stop"
    assert out.text == (
        '<think>\nI look.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    )


def test_a_script_answers_a_tool_result():
    """The rule for tool results is chosen by the role of the last message."""
    ids = (256, *say("user", b"weather?"), *say("tool", b"18"), 258, *b"assistant\n")
    out = reply(scripted(), ids, chat=False)
    assert out.text == "It is 18 °C."


def test_a_script_answers_a_plain_prompt():
    """Without a chat the whole prompt is the message."""
    assert reply(scripted(), b"choose", chat=False).text in ("red", "blue")


def test_choices_go_by_seed():
    """Of several replies the seed picks one."""
    texts = [reply(scripted(), b"choose", seed=seed).text for seed in range(4)]
    assert texts == ["red", "blue", "red", "blue"]


def test_what_no_rule_matches_is_answered_as_usual():
    """The device talks as it does without a script."""
    assert reply(scripted(), b"hello", temperature=0.0).text == reply(mock_engine(), b"hello", temperature=0.0).text


def test_a_script_drips():
    """Each token takes its time."""
    engine = scripted()
    assert reply(engine, b"slow").text == "slowly"
    assert engine.status().step_seconds >= 6 * 0.002


def test_a_scripted_failure_fails_its_sequence_alone():
    """What was said before is emitted, then the error; the neighbour goes on."""
    engine = scripted()
    out = collect(engine, [request(b"deny me"), request(b"choose", "other")])
    assert (out["r"].text, out["r"].deltas[-1].error.code) == ("Well", ErrorCode.RESOURCE_EXHAUSTED)
    assert out["other"].text == "red"
    engine.check_integrity()


def test_a_scripted_crash_ends_the_engine_and_a_continuation_gets_through():
    """The engine dies at that place; another one that continues the sequence says the rest."""
    engine = scripted()
    out = reply(engine, b"die")
    assert isinstance(engine.died, EngineDiedError)
    assert (out.text, out.deltas[-1].error.code) == ("Good", ErrorCode.ENGINE_DIED)
    assert reply(scripted(), b"die", emitted=b"Good").text == "bye"


async def test_a_scripted_crash_is_an_engine_died_error_for_streams():
    """Through LocalEngine the stream raises, so that the control plane continues it elsewhere."""
    local = LocalEngine(scripted())
    seen = []
    with pytest.raises(EngineDiedError):
        async for delta in local.stream(request(b"die")):
            seen += delta.token_ids
    assert bytes(seen) == b"Good"
    await local.close()


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("{", "malformed"),
        ('{"rules": [{"reply": [{"sing": "la"}]}]}', "sing"),
        ('{"rules": [{"reply": [{"say": "a", "think": "b"}]}]}', "one thing"),
        ('{"rules": [{"contains": "x"}]}', "either a reply or choices"),
        ('{"rules": [{"reply": [{"fail": "nonsense"}]}]}', "nonsense"),
    ],
)
def test_a_malformed_script_is_refused_with_the_place(tmp_path, text, mention):
    """The message says what is wrong."""
    path = tmp_path / "script.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=mention):
        load_script(path)


def test_a_script_is_read_from_its_file(tmp_path):
    """What is written as JSON is what is read."""
    path = tmp_path / "script.json"
    path.write_bytes(msgspec.json.encode(SCRIPT))
    assert load_script(path) == SCRIPT
