"""Guessing: what is looked up, how far ahead, and what is learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core.request import SequenceState
from sagellm_core.scheduler import Work
from sagellm_core.speculation import NgramSpeculator, best_length
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams


def sequence(tokens):
    request = EngineRequest(
        request_id="r", prompt_token_ids=tuple(tokens), sampling=SamplingParams(max_tokens=1000, seed=0)
    )
    seq = SequenceState.of(request, arrival=1, now=0.0, ageing_s=1.0, root=b"")
    seq.computed = len(tokens) - 1
    return seq


def guess(speculator, seq, n):
    work = Work(seq, seq.computed, 1, n)
    speculator.plan([seq])
    speculator.propose([work])
    return work


@pytest.fixture(autouse=True)
def optimistic(monkeypatch):
    """Begin with trust, so that lookups can be seen at full length."""
    monkeypatch.setattr("sagellm_core.speculation._PRIOR", 0.99)


def test_what_followed_the_tail_before_is_guessed_to_follow_again():
    """The longest tail that occurred before decides, its latest occurrence first."""
    speculator = NgramSpeculator(4, 3, 1)
    assert guess(speculator, sequence([1, 2, 3, 9, 8, 1, 2, 3]), 3).draft == [9, 8, 1]
    assert guess(NgramSpeculator(4, 3, 1), sequence([2, 5, 1, 2, 7, 2]), 1).draft == [7]


def test_a_loop_is_continued_beyond_its_end():
    """A guess that runs past the newest token goes on in itself."""
    assert guess(NgramSpeculator(8, 2, 1), sequence([1, 2, 1, 2]), 6).draft == [1, 2, 1, 2, 1, 2]


def test_nothing_is_guessed_without_a_precedent():
    """A tail that never occurred gives no guess."""
    assert guess(NgramSpeculator(4, 3, 2), sequence([1, 2, 3, 4]), 4).draft == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 5))
def test_lookup_equals_a_plain_search(tokens, n):
    """The incremental index finds what a search through the whole sequence finds."""
    speculator = NgramSpeculator(8, 3, 1)
    seq = sequence(tokens[:1])
    for end in range(1, len(tokens) + 1):
        seq.tokens = tokens[:end]
        assert guess(speculator, seq, n).draft == plain(tokens[:end], n)


def plain(tokens, n):
    for size in (3, 2, 1):
        tail = tokens[-size:]
        for start in range(len(tokens) - 1, size - 1, -1):
            if len(tail) == size and tokens[start - size : start] == tail:
                return [tokens[start + ahead % (len(tokens) - start)] for ahead in range(n)]
    return []


def drive(speculator, seq, steps, accept):
    """Guess `steps` times; `accept` says how many of a guess hold. Returns the lengths of the guesses."""
    lengths = []
    for _ in range(steps):
        speculator.plan([seq])
        work = guess(speculator, seq, seq.want_draft)
        lengths.append(len(work.draft))
        if work.draft:
            speculator.observe(work, accept(len(work.draft)))
    return lengths


def test_guesses_grow_while_they_hold_and_stop_while_they_do_not(monkeypatch):
    """The length adapts to what was accepted; when nothing holds, only a probe now and then is left."""
    monkeypatch.setattr("sagellm_core.speculation._PRIOR", 0.5)
    speculator = NgramSpeculator(8, 3, 1)
    seq = sequence([1, 2, 1, 2])
    grown = drive(speculator, seq, 12, lambda n: n)
    assert grown == sorted(grown)
    assert 1 < grown[0] < 8
    assert grown[-1] == 8
    shrunk = [n for n in drive(speculator, seq, 200, lambda n: 0) if n]
    assert shrunk == sorted(shrunk, reverse=True)
    assert shrunk[-1] == 1
    assert len(shrunk) < 30


def test_short_tails_are_trusted_by_their_own_record():
    """Bad guesses after one-token tails do not shorten those after three-token tails."""
    speculator = NgramSpeculator(8, 3, 1)
    seq = sequence([1, 2, 3, 9, 4, 3])
    drive(speculator, seq, 20, lambda n: 0)
    assert guess(speculator, seq, 8).draft in ([], [9])
    seq.tokens = [1, 2, 3, 9, 4, 1, 2, 3]
    assert len(guess(speculator, seq, 8).draft) == 8


@given(st.floats(0.0, 1.0), st.floats(0.01, 1.0), st.integers(1, 10))
def test_the_best_length_gives_most_tokens_for_the_time(rate, cost, most):
    """No other length has a better ratio of expected tokens to time; certain failure guesses nothing."""
    best = best_length(rate, cost, most)

    def gain(length):
        return sum(rate**i for i in range(length + 1)) / (1 + cost * length)

    assert 0 <= best <= most
    assert gain(best) >= max(gain(length) for length in range(most + 1)) - 1e-9
    assert rate > cost or best == 0


def test_a_full_batch_guesses_less(monkeypatch):
    """Rows cost more where many sequences share the step."""
    monkeypatch.setattr("sagellm_core.speculation._PRIOR", 0.5)
    speculator = NgramSpeculator(8)
    few, many = [sequence([1, 2])], [sequence([1, 2]) for _ in range(16)]
    for number, seq in enumerate(many):
        seq.arrival = 100 + number
    speculator.plan(few)
    speculator.plan(many)
    assert many[0].want_draft < few[0].want_draft


def test_an_ended_sequence_is_forgotten():
    """No state stays behind."""
    speculator = NgramSpeculator(8)
    seq = sequence([1, 2, 1, 2])
    guess(speculator, seq, 2)
    speculator.forget(seq)
    assert not speculator._indexes
    assert not speculator._lengths._of
