"""Incremental UTF-8, stop strings and the decoder of a choice: the cut does not matter."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core.text.bytes_model import EOS, ByteChatModel
from sagellm_core.text.decoder import ChoiceDecoder, spell_logprobs
from sagellm_core.text.stream import StopMatcher, Utf8Stream
from sagellm_protocol.engine import TokenDelta
from sagellm_protocol.generation import ChoiceDelta, TokenLogprob
from sagellm_protocol.ports import TextDecoder


def _pieces(data: Sequence, cuts: list[int]) -> list[Sequence]:
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(data=st.one_of(st.binary(), st.text().map(str.encode)), cuts=st.lists(st.integers(0, 60)))
def test_utf8_pieces_are_the_whole(data: bytes, cuts: list[int]) -> None:
    """Pieces of any bytes under any cut join to the decode of all of them."""
    stream = Utf8Stream()
    text = "".join(stream.push(bytes(piece)) for piece in _pieces(data, cuts)) + stream.flush()
    assert text == data.decode("utf-8", "replace")


@given(text=st.text(), cuts=st.lists(st.integers(0, 60)))
def test_no_replacement_character_at_borders(text: str, cuts: list[int]) -> None:
    """Valid text never shows U+FFFD unless it holds one, wherever a character is cut."""
    stream = Utf8Stream()
    shown = [stream.push(bytes(piece)) for piece in _pieces(text.encode("utf-8", "ignore"), cuts)]
    assert ("\ufffd" in "".join(shown)) == ("\ufffd" in text)


def _first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop string that is complete first, of those that end together the longest."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


_SHORT = st.text(alphabet="ab", max_size=30)


@given(
    text=_SHORT,
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30)),
)
def test_stop_strings_are_found_under_any_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    """Output and match are those of the definition, whatever pieces the text comes in, and nothing of a stop leaks out."""
    want, stop = _first_stop(text, stops)
    matcher = StopMatcher(stops)
    out = ""
    for piece in _pieces(text, cuts):
        out += matcher.push(str(piece))
        assert want.startswith(out)
    out += "" if matcher.matched else matcher.flush()
    assert (out, matcher.matched) == (want, stop)


@pytest.mark.slow
def test_stop_matching_takes_linear_time() -> None:
    """A long output against a stop string that nearly matches everywhere takes a time proportional to its length."""

    def seconds(length: int) -> float:
        matcher = StopMatcher(["a" * 2000 + "b"])
        start = time.thread_time()
        for _ in range(length):
            matcher.push("a")
        return time.thread_time() - start

    seconds(1000)
    short, long = min(seconds(4000) for _ in range(3)), min(seconds(16000) for _ in range(3))
    assert long < 12 * short


def _run(decoder: TextDecoder, ids: Sequence[int], cuts: list[int], end: str = "length") -> list[ChoiceDelta]:
    deltas = [TokenDelta(request_id="r", token_ids=tuple(piece)) for piece in _pieces(ids, cuts)]
    deltas.append(TokenDelta(request_id="r", finish_reason=end))
    return [out for delta in deltas if (out := decoder.push(delta)) is not None]


@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 80)), cut_at=st.integers(0, 200))
def test_streamed_text_is_the_full_decode(text: str, cuts: list[int], cut_at: int) -> None:
    """For random unicode under any cut, and cut short anywhere, the deltas join to the decode of all ids, and carry all ids."""
    model = ByteChatModel("m", 1000)
    ids = model.tokenize(text.encode("utf-8", "ignore").decode(), add_special_tokens=False)[:cut_at]
    out = _run(ChoiceDecoder(model.tokenizer.token_bytes), ids, cuts)
    assert "".join(delta.text for delta in out) == model.detokenize(ids)
    assert [t for delta in out for t in delta.token_ids] == ids
    assert [delta.finish_reason for delta in out][-1] == "length"
    assert all(delta.finish_reason is None for delta in out[:-1])


def test_a_stop_string_ends_the_choice_once() -> None:
    """After a match the delta says stop and which, and whatever the engine still sends is ignored."""
    decoder = ChoiceDecoder(lambda i: bytes([i]), stops=["END"])
    shown = [decoder.push(TokenDelta(request_id="r", token_ids=tuple(b))) for b in (b"abE", b"N", b"Dxyz", b"more")]
    assert shown[0] is not None
    assert (shown[0].text, shown[0].token_ids) == ("ab", tuple(b"abE"))
    assert shown[1] is None
    assert shown[2] is not None
    assert (shown[2].text, shown[2].finish_reason, shown[2].stop_match) == ("", "stop", "END")
    assert shown[2].token_ids == tuple(b"ND")
    assert shown[3] is None
    assert decoder.push(TokenDelta(request_id="r", finish_reason="cancelled")) is None


def test_stop_strings_wait_for_min_tokens() -> None:
    """A stop string within the first min_tokens tokens is output."""
    decoder = ChoiceDecoder(lambda i: bytes([i]), stops=["b"], min_tokens=3)
    out = _run(decoder, list(b"abcabc"), [])
    assert "".join(delta.text for delta in out) == "abca"


def test_control_tokens_are_no_text() -> None:
    """Ids of control tokens are reported as ids and add no text."""
    model = ByteChatModel("m", 100)
    decoder = ChoiceDecoder(model.tokenizer.token_bytes, hidden=model.tokenizer.specials.ids)
    out = _run(decoder, [72, EOS, 105], [])
    assert ("".join(d.text for d in out), out[0].token_ids) == ("Hi", (72, EOS, 105))


def test_logprobs_go_out_with_their_text() -> None:
    """Each token's entry has its bytes and the text that it completes; alternatives are spelled too."""
    euro = "€".encode()
    top = (TokenLogprob(token_id=euro[0], logprob=-0.1), TokenLogprob(token_id=65, logprob=-3.0))
    entries = tuple(TokenLogprob(token_id=b, logprob=-0.1, top=top) for b in euro)
    decoder = ChoiceDecoder(lambda i: bytes([i]))
    assert decoder.push(TokenDelta(request_id="r", token_ids=tuple(euro[:2]), logprobs=entries[:2])) is None
    out = decoder.push(TokenDelta(request_id="r", token_ids=tuple(euro[2:]), logprobs=entries[2:]))
    assert out is not None
    assert out.logprobs is not None
    assert [(e.text, e.data) for e in out.logprobs] == [("", euro[:1]), ("", euro[1:2]), ("€", euro[2:])]
    assert [(t.text, t.data) for t in out.logprobs[0].top] == [("", euro[:1]), ("A", b"A")]
    spelled = spell_logprobs([None, *entries], lambda i: bytes([i]))
    assert [e and e.text for e in spelled] == [None, "", "", "€"]


@pytest.mark.parametrize("reason", ["stop", "length", "error", "cancelled"])
def test_held_text_is_flushed_at_the_end(reason: str) -> None:
    """What was held back for a stop string or an unfinished character comes with the last delta."""
    decoder = ChoiceDecoder(lambda i: bytes([i]), stops=["xyz"])
    assert decoder.push(TokenDelta(request_id="r", token_ids=tuple(b"xy"))) is None
    out = decoder.push(TokenDelta(request_id="r", token_ids=(0xE2,), finish_reason=reason))
    assert out is not None
    assert (out.text, out.finish_reason, out.stop_match) == ("xy\ufffd", reason, None)
