"""The next token: docs/design/0030-sampling-stream.md as code, and the yardstick of every other backend's sampler.

`probabilities` gives the exact distribution that `sample` draws from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sagellm_backend.base import RowSampling
from sagellm_protocol.sampling import SamplingParams

__all__ = [
    "EXP2_COEFFICIENTS",
    "integer_weights",
    "kept_weights",
    "log_softmax",
    "philox4x32",
    "probabilities",
    "process_logits",
    "report",
    "sample",
    "sample_rows",
    "stream_word",
]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

MAX_VOCAB = 1 << 19
"""Sums of so many weights of at most 2^44 still fit in 64 bits."""

COLDEST = 1e-5
"""Below this temperature sampling is greedy."""

EXP2_COEFFICIENTS = tuple(
    float.fromhex(text)
    for text in (
        "0x1.0000000000000p+0",
        "0x1.62e42fefa39efp-1",
        "0x1.ebfbdff82c58fp-3",
        "0x1.c6b08d704a0c0p-5",
        "0x1.3b2ab6fba4e77p-7",
        "0x1.5d87fe78a6731p-10",
        "0x1.430912f86c787p-13",
        "0x1.ffcbfc588b0c7p-17",
        "0x1.62c0223a5c824p-20",
        "0x1.b5253d395e7c4p-24",
        "0x1.e4cf5158b8ecap-28",
        "0x1.e8cac7351bb25p-32",
    )
)
"""Taylor coefficients of 2^f, ln(2)^k / k!; the error on [-0.5, 0.5] is below 2^-47."""

_LOG2_E = 1.4426950408889634
_WEIGHT_BITS = 44
_MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., 2011): four random 32-bit words as a pure function of counter and key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def stream_word(seed: int, position: int) -> int:
    """Random number `position` of `seed`'s stream, uniform on [0, 2^64)."""
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    out = philox4x32((position & _MASK32, (position >> 32) & _MASK32, 0, 0), key)
    return out[0] | (out[1] << 32)


def process_logits(logits: Float32, row: RowSampling) -> Float32:
    """Return a copy of `logits` (vocab,) after bias, masks and penalties; excluded tokens are -inf.

    Raises:
        ValueError: an id in the row's parameters is not below the vocabulary size, or the mask is too short.
    """
    if logits.size > MAX_VOCAB:
        raise ValueError(f"a vocabulary of {logits.size} is above the sampler's limit of {MAX_VOCAB}")
    z = np.array(logits, dtype=np.float32)
    for token, bias in (row.params.logit_bias or {}).items():
        z[_checked(token, z.size, "logit_bias")] += np.float32(bias)
    _apply_masks(z, row)
    _apply_penalties(z, row.params, np.asarray(row.history, dtype=np.int64), row.n_prompt)
    z[~np.isfinite(z)] = -np.inf
    return z


def _checked(token: int, vocab: int, name: str) -> int:
    if not 0 <= token < vocab:
        raise ValueError(f"{name} names token {token}, the vocabulary ends at {vocab - 1}")
    return token


def _apply_masks(z: Float32, row: RowSampling) -> None:
    if row.mask is not None:
        words = (z.size + 31) // 32
        if row.mask.size < words:
            raise ValueError(f"the mask has {row.mask.size} words, a vocabulary of {z.size} needs {words}")
        bits = np.unpackbits(row.mask.astype("<u4").view(np.uint8), bitorder="little")[: z.size]
        z[bits == 0] = -np.inf
    if row.params.allowed_token_ids is not None:
        allowed = [_checked(t, z.size, "allowed_token_ids") for t in row.params.allowed_token_ids]
        excluded = np.ones(z.size, bool)
        excluded[allowed] = False
        z[excluded] = -np.inf
    for token in row.banned:
        z[_checked(token, z.size, "banned")] = -np.inf


def _apply_penalties(z: Float32, params: SamplingParams, history: Int64, n_prompt: int) -> None:
    if history.size == 0:
        return
    if history.min() < 0 or history.max() >= z.size:
        raise ValueError(f"history holds an id outside the vocabulary of {z.size}")
    if params.repetition_penalty != 1.0:
        ids = np.unique(history)
        r = np.float32(params.repetition_penalty)
        with np.errstate(over="ignore"):  # an overflow is excluded like any other infinity
            z[ids] = np.where(z[ids] > 0, z[ids] / r, z[ids] * r)
    ids, counts = np.unique(history[n_prompt:], return_counts=True)
    if params.frequency_penalty != 0.0:
        z[ids] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    if params.presence_penalty != 0.0:
        z[ids] -= np.float32(params.presence_penalty)


def integer_weights(x: Float64) -> UInt64:
    """floor(2^x · 2^44) for x <= 0, the same bits on every machine; 0 below x = -45 and for -inf."""
    out = np.zeros(x.size, np.uint64)
    live = np.flatnonzero(x >= -45.0)
    n = np.rint(x[live])
    f = x[live] - n
    p = np.full(live.size, EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        p = p * f + coefficient
    out[live] = np.floor(np.ldexp(p, n.astype(np.int32) + _WEIGHT_BITS)).astype(np.uint64)
    return out


def kept_weights(z: Float32, params: SamplingParams) -> tuple[Int64, UInt64]:
    """Candidates that survive the filters, and their integer weights; ids ascending, both empty if no logit is finite.

    `z` are processed logits; `params.temperature` is at least `COLDEST`.
    """
    top = z.max(initial=-np.inf)
    if top == -np.inf:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    x = (z.astype(np.float64) - np.float64(top)) * (_LOG2_E / params.temperature)
    w = integer_weights(x)
    ids = np.flatnonzero(w)
    if params.top_k:
        ids = _by_logit(ids, z)[: params.top_k]
    if params.typical_p < 1.0:
        ids = _typical(np.sort(ids), x, w, params.typical_p)
    if params.top_p < 1.0:
        ids = _prefix(_by_logit(ids, z), w, params.top_p)
    if params.min_p > 0.0:
        ids = ids[w[ids].astype(np.float64) >= params.min_p * np.float64(w[ids].max())]
    ids = np.sort(ids)
    return ids, w[ids]


def _by_logit(ids: Int64, z: Float32) -> Int64:
    """`ids` by logit descending, then id ascending."""
    return ids[np.lexsort((ids, -z[ids]))]


def _prefix(ordered: Int64, w: UInt64, share: float) -> Int64:
    """The shortest prefix of `ordered` that holds `share` of its weight."""
    running = np.cumsum(w[ordered], dtype=np.uint64).astype(np.float64)
    return ordered[: int(np.searchsorted(running, share * running[-1], side="left")) + 1]


def _typical(ids: Int64, x: Float64, w: UInt64, share: float) -> Int64:
    """Locally typical tokens (Meister et al., 2022): nearest first to the entropy, `share` of the weight."""
    weights = w[ids].astype(np.float64)
    total = np.float64(w[ids].sum(dtype=np.uint64))
    expected = np.add.accumulate(weights * x[ids])[-1] / total  # accumulate adds one after another, sum does not
    distance = np.abs(x[ids] - expected)
    return _prefix(ids[np.lexsort((ids, distance))], w, share)


def sample(logits: Float32, row: RowSampling) -> int:
    """Draw the token that follows, from raw logits (vocab,); -1 if nothing can be drawn."""
    z = process_logits(logits, row)
    if row.params.temperature < COLDEST:
        best = int(np.argmax(z))  # the first, so the lowest id, of equals
        return best if z[best] > -np.inf else -1
    ids, weights = kept_weights(z, row.params)
    if ids.size == 0:
        return -1
    running = np.cumsum(weights, dtype=np.uint64)
    target = (stream_word(row.seed, row.position) * int(running[-1])) >> 64
    return int(ids[np.searchsorted(running, np.uint64(target), side="right")])


def probabilities(logits: Float32, row: RowSampling) -> Float64:
    """The exact distribution (vocab,) that `sample` draws from; all zero if nothing can be drawn."""
    z = process_logits(logits, row)
    out = np.zeros(z.size)
    if row.params.temperature < COLDEST:
        best = int(np.argmax(z))
        out[best] = z[best] > -np.inf
        return out
    ids, weights = kept_weights(z, row.params)
    if ids.size:
        out[ids] = weights / float(weights.sum(dtype=np.uint64))
    return out


def log_softmax(logits: Float32) -> Float32:
    """Natural-log probabilities (vocab,) of raw logits; -inf where a logit is not finite."""
    z = np.where(np.isfinite(logits), logits, -np.inf).astype(np.float64)
    top = z.max(initial=-np.inf)
    if top == -np.inf:
        return np.full(z.size, -np.inf, np.float32)
    z -= top
    out: Float32 = (z - np.log(np.exp(z).sum())).astype(np.float32)
    return out


def report(logits: Float32, token: int, count: int) -> tuple[float, Int32, Float32]:
    """Log-probability of `token` (NaN for -1) and the `count` likeliest alternatives, by logit, then id."""
    logprobs = log_softmax(logits)
    clean = np.where(np.isfinite(logits), logits, -np.inf)
    count = min(count, clean.size)
    if count == 0:
        ids = np.empty(0, np.int64)
    else:
        # Everything that ties with the last place must take part, so that the lower id wins.
        floor = np.partition(clean, clean.size - count)[clean.size - count]
        ids = _by_logit(np.flatnonzero(clean >= floor), clean)[:count]
    chosen = float(logprobs[token]) if token >= 0 else float("nan")
    return chosen, ids.astype(np.int32), logprobs[ids]


def sample_rows(logits: Float32, rows: Sequence[RowSampling]) -> tuple[Int32, Float32, Int32, Float32]:
    """Draw for every row of `logits` (n, vocab).

    Returns:
        token ids (n,), log-probabilities (n,), alternatives' ids and log-probabilities (n, k), as in `StepResult`.
    """
    k = max((row.logprobs for row in rows), default=0)
    tokens = np.full(len(rows), -1, np.int32)
    chosen = np.full(len(rows), np.nan, np.float32)
    top_ids = np.full((len(rows), max(k, 0)), -1, np.int32)
    top_logprobs = np.full(top_ids.shape, np.nan, np.float32)
    for i, row in enumerate(rows):
        tokens[i] = row.target if row.target >= 0 else sample(logits[i], row)
        if row.logprobs >= 0 or row.target >= 0:
            chosen[i], ids, values = report(logits[i], int(tokens[i]), max(row.logprobs, 0))
            top_ids[i, : ids.size], top_logprobs[i, : ids.size] = ids, values
    return tokens, chosen, top_ids, top_logprobs
