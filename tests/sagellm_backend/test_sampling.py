from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.base import RowSampling
from sagellm_backend.sampling import (
    EXP2_COEFFICIENTS,
    integer_weights,
    log_softmax,
    philox4x32,
    probabilities,
    process_logits,
    report,
    sample,
    sample_rows,
    stream_word,
)
from sagellm_protocol.sampling import SamplingParams

LOGITS = np.array([1.0, 3.0, 3.0, -2.0, 0.5, 2.0, -8.0, 1.5], np.float32)


def row(**changes: object) -> RowSampling:
    fields = {name: changes.pop(name) for name in list(changes) if name in RowSampling.__slots__}
    return RowSampling(params=SamplingParams(**changes), **fields)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max())
    return e / e.sum()


def test_philox_check_values() -> None:
    """Philox4x32-10 gives Random123's known answers."""
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    got = philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert got == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_stream_takes_negative_seeds_and_large_positions() -> None:
    """Seed and position use all of their 64 bits."""
    words = {stream_word(seed, pos) for seed in (-1, 1, 2**63 - 1, -(2**63)) for pos in (0, 1, 2**32, 2**40)}
    assert len(words) == 16


@settings(max_examples=200, deadline=None)
@given(st.floats(-46, 0))
def test_integer_weights_are_powers_of_two(x: float) -> None:
    """A weight is 2^(x + 44) to within rounding of its last bits."""
    got = int(integer_weights(np.array([x]))[0])
    want = 2.0 ** (x + 44)
    assert abs(got - want) <= 1 + want * 2**-46


def test_integer_weights_of_the_ends() -> None:
    """The likeliest token weighs exactly 2^44, an excluded one nothing."""
    assert integer_weights(np.array([0.0, -np.inf, -45.1, -1.0])).tolist() == [1 << 44, 0, 0, 1 << 43]


def test_integer_weights_check_values() -> None:
    """Weights equal exact rational evaluation of the written-out polynomial, rounded as IEEE says."""
    x = -np.linspace(0.01, 44.9, 57)
    for value, got in zip(x, integer_weights(x), strict=True):
        n = round(value)
        f = value - n
        p = EXP2_COEFFICIENTS[11]
        for k in range(10, -1, -1):
            p = float(Fraction(float(Fraction(p) * Fraction(f))) + Fraction(EXP2_COEFFICIENTS[k]))
        assert int(got) == math.floor(Fraction(p) * Fraction(2) ** (n + 44))


def test_coefficients_are_the_taylor_series() -> None:
    """The written-out coefficients are ln(2)^k / k!."""
    want = [math.log(2) ** k / math.factorial(k) for k in range(12)]
    np.testing.assert_allclose(EXP2_COEFFICIENTS, want, rtol=1e-14)


def test_greedy_takes_the_lowest_of_equals() -> None:
    """Temperature 0 takes the likeliest token, the lower id on a tie, and so does a temperature below 1e-5."""
    assert sample(LOGITS, row(temperature=0.0)) == 1
    assert sample(LOGITS, row(temperature=1e-6)) == 1


def test_plain_sampling_is_softmax() -> None:
    """Without filters the distribution is the softmax of logits over temperature."""
    for temperature in (0.3, 1.0, 2.0):
        got = probabilities(LOGITS, row(temperature=temperature))
        np.testing.assert_allclose(got, softmax(LOGITS.astype(np.float64) / temperature), atol=1e-12)


def test_top_k_breaks_ties_by_id() -> None:
    """top_k keeps exactly k tokens, the lower ids of equals."""
    assert np.flatnonzero(probabilities(LOGITS, row(top_k=1))).tolist() == [1]
    assert np.flatnonzero(probabilities(LOGITS, row(top_k=3))).tolist() == [1, 2, 5]
    assert np.count_nonzero(probabilities(LOGITS, row(top_k=99))) == 8


def test_top_p_keeps_the_shortest_prefix() -> None:
    """top_p keeps the likeliest tokens until they hold the share, the one that crosses it included."""
    p = softmax(LOGITS)
    assert np.flatnonzero(probabilities(LOGITS, row(top_p=float(p[1]) * 0.99))).tolist() == [1]
    assert np.flatnonzero(probabilities(LOGITS, row(top_p=float(p[1]) * 1.01))).tolist() == [1, 2]
    kept = probabilities(LOGITS, row(top_p=float(p[1] * 2 + p[5]) * 0.999))
    assert np.flatnonzero(kept).tolist() == [1, 2, 5]
    assert kept.sum() == pytest.approx(1)


def test_min_p_is_relative_to_the_likeliest() -> None:
    """min_p drops what is less than that share of the likeliest token's probability."""
    kept = np.flatnonzero(probabilities(LOGITS, row(min_p=0.2)))
    assert kept.tolist() == np.flatnonzero(softmax(LOGITS) >= 0.2 * softmax(LOGITS).max()).tolist()


def test_typical_p_follows_the_paper() -> None:
    """typical_p keeps the tokens whose surprise is nearest to the entropy, to the share."""
    rng = np.random.default_rng(2)
    z = rng.standard_normal(50).astype(np.float32) * 2
    p = softmax(z)
    entropy = -(p * np.log(p)).sum()
    order = np.argsort(np.abs(-np.log(p) - entropy), kind="stable")
    want = order[: np.searchsorted(np.cumsum(p[order]), 0.6) + 1]
    assert set(np.flatnonzero(probabilities(z, row(typical_p=0.6)))) == set(want)


def test_filters_compose_in_the_documented_order() -> None:
    """top_p takes its share of what top_k left, not of the whole."""
    p = softmax(LOGITS)
    share = float((p[1] + p[2]) / (p[1] + p[2] + p[5])) * 0.999
    assert np.flatnonzero(probabilities(LOGITS, row(top_k=3, top_p=share))).tolist() == [1, 2]
    assert np.count_nonzero(probabilities(LOGITS, row(top_p=share))) > 3


def test_penalties_follow_their_definitions() -> None:
    """Repetition covers prompt and output once, frequency counts the output, presence marks it."""
    history = (0, 3, 3, 3, 1)
    z = process_logits(LOGITS, row(repetition_penalty=2.0, history=history, n_prompt=2))
    np.testing.assert_array_equal(z, np.array([0.5, 1.5, 3.0, -4.0, 0.5, 2.0, -8.0, 1.5], np.float32))
    z = process_logits(LOGITS, row(frequency_penalty=0.5, presence_penalty=1.0, history=history, n_prompt=2))
    np.testing.assert_array_equal(z, np.array([1.0, 1.5, 3.0, -4.0, 0.5, 2.0, -8.0, 1.5], np.float32))


def test_bias_and_masks() -> None:
    """logit_bias adds, masks exclude whatever the bias, and only what all masks allow is left."""
    mask = np.array([0b10111101], np.uint32)
    z = process_logits(
        LOGITS, row(logit_bias={1: 100.0, 4: 2.0}, mask=mask, allowed_token_ids=(0, 1, 4, 5), banned=(0,))
    )
    assert z[4] == 2.5
    assert np.flatnonzero(np.isfinite(z)).tolist() == [4, 5]


def test_nothing_left_is_minus_one() -> None:
    """A row with every token masked, or no finite logit, draws -1 and does not raise."""
    nothing = np.array([0], np.uint32)
    assert sample(LOGITS, row(mask=nothing)) == -1
    assert sample(LOGITS, row(mask=nothing, temperature=0.0)) == -1
    assert sample(np.full(8, np.nan, np.float32), row()) == -1
    assert probabilities(LOGITS, row(mask=nothing)).sum() == 0


def test_non_finite_logits_are_excluded() -> None:
    """NaN and both infinities are never drawn, however cold."""
    z = np.array([np.nan, np.inf, -np.inf, 0.0], np.float32)
    for temperature in (0.0, 1.0):
        assert sample(z, row(temperature=temperature)) == 3


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"logit_bias": {8: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": (9,)}, "allowed_token_ids"),
        ({"banned": (-1,)}, "banned"),
        ({"repetition_penalty": 1.1, "history": (8,)}, "history"),
        ({"mask": np.empty(0, np.uint32)}, "mask"),
    ],
)
def test_ids_outside_the_vocabulary_raise(changes: dict[str, object], name: str) -> None:
    """An id that the vocabulary lacks is an error that names the parameter."""
    with pytest.raises(ValueError, match=name):
        sample(LOGITS, row(**changes))


SAMPLERS: dict[str, dict[str, object]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "history": (1, 2, 2, 5, 5, 5),
        "n_prompt": 2,
    },
    "bias and masks": {"logit_bias": {3: 2.0}, "banned": (1,), "mask": np.array([0x7FF], np.uint32)},
    "allowed": {"allowed_token_ids": (1, 4, 5, 9), "temperature": 0.8},
    "all": {"temperature": 0.9, "top_k": 9, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    """20,000 draws pass a chi-square test against the exact distribution at the 0.1 % level."""
    logits = np.random.default_rng(5).standard_normal(12).astype(np.float32) * 1.5
    expected = probabilities(logits, row(**SAMPLERS[name])) * 20_000
    counts = np.zeros(12)
    for position in range(20_000):
        counts[sample(logits, row(**SAMPLERS[name], seed=77, position=position))] += 1
    live = expected >= 5
    assert not counts[expected == 0].any()
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    degrees = int(live.sum()) - 1
    # Wilson-Hilferty: the 99.9 % point of chi-square.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < bound


def test_streams_of_seeds_differ() -> None:
    """Two seeds give unrelated draws, one seed the same draws twice."""
    flat = np.zeros(1000, np.float32)
    a = [sample(flat, row(seed=1, position=i)) for i in range(50)]
    assert a == [sample(flat, row(seed=1, position=i)) for i in range(50)]
    assert sum(x == y for x, y in zip(a, [sample(flat, row(seed=2, position=i)) for i in range(50)], strict=True)) < 3


def test_logprobs_are_of_the_raw_distribution() -> None:
    """Reported log-probabilities ignore bias, penalties, temperature and filters."""
    rows = [row(temperature=0.0, logit_bias={3: 50.0}, logprobs=2)]
    tokens, chosen, top_ids, top = sample_rows(LOGITS[None], rows)
    want = np.log(softmax(LOGITS))
    assert tokens.tolist() == [3]
    assert chosen[0] == pytest.approx(want[3], abs=1e-6)
    assert top_ids.tolist() == [[1, 2]]
    np.testing.assert_allclose(top[0], want[[1, 2]], atol=1e-6)


def test_rows_pad_to_the_widest_request() -> None:
    """A row's alternatives do not depend on what the other rows asked for."""
    rows = [row(logprobs=0, seed=1), row(logprobs=3, seed=1), row(seed=1), row(target=6)]
    tokens, chosen, top_ids, top = sample_rows(np.stack([LOGITS] * 4), rows)
    assert top_ids.shape == (4, 3)
    assert (top_ids[[0, 2, 3]] == -1).all()
    assert np.isnan(top[[0, 2, 3]]).all()
    assert np.isnan(chosen).tolist() == [False, False, True, False]
    assert tokens[3] == 6
    assert chosen[3] == pytest.approx(log_softmax(LOGITS)[6])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 20))
def test_report_orders_ties_by_id(values: list[int], count: int) -> None:
    """Alternatives come by logit descending, then id, also where the last place is tied."""
    z = np.array(values, np.float32)
    _, ids, _ = report(z, 0, count)
    assert ids.tolist() == sorted(range(z.size), key=lambda t: (-z[t], t))[:count]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 2),
    st.integers(0, 8),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.floats(0.05, 1),
)
def test_a_draw_is_always_possible_under_the_filters(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    """Whatever the filters, a token of positive probability is drawn."""
    z = np.random.default_rng(seed).standard_normal(30).astype(np.float32) * 4
    r = row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p, seed=seed)
    assert probabilities(z, r)[sample(z, r)] > 0
