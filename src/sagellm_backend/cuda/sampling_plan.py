"""What the device must know of the rows that draw: docs/design/0030-sampling-stream.md as arrays, made on the host.

Everything that a request can get wrong is refused here, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sagellm_backend.base import RowSampling
from sagellm_backend.sampling import COLDEST

__all__ = ["Edits", "SamplingPlan", "gather_masks", "plan_sampling", "stream_words"]

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt32 = npt.NDArray[np.uint32]

_LOG2_E = 1.4426950408889634
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes of single logits: entry i changes token ``tokens[i]`` of row ``rows[i]`` by ``values[i]``; no pair occurs twice."""

    rows: Int64
    tokens: Int64
    values: Float32

    @property
    def size(self) -> int:
        """How many."""
        return int(self.rows.size)


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """n rows.

    Attributes:
        bias, banned, repetition, frequency, presence: in the order in which they apply; a banned token becomes -inf, a repeated
            one is divided or multiplied, the others are added or subtracted.
        masked: rows with a bit mask, which `gather_masks` reads when it is written.
        scale: f64 (n,), log2 e over the temperature; 0 where the row is greedy.
        words: int64 (n, 2), low and high half of the random number of the row.
        targets: int64 (n,), id to report instead of drawing, or -1.
        filtered: rows with top_k, top_p or min_p; `top_k`, `top_p`, `min_p` are theirs (top_k is the vocabulary where it is off).
        hosted: rows with typical_p, whose sum is defined as one addition after another: the host draws them.
        reported: rows whose log-probability is wanted.
        n_top: (reported,), alternatives of each.
    """

    bias: Edits
    banned: Edits
    repetition: Edits
    frequency: Edits
    presence: Edits
    masked: Int64
    scale: Float64
    words: Int64
    targets: Int64
    filtered: Int64
    top_k: Int64
    top_p: Float64
    min_p: Float64
    hosted: tuple[int, ...]
    reported: Int64
    n_top: Int64

    @property
    def edited(self) -> bool:
        """Whether any logit is changed before the draw."""
        edits = (self.bias, self.banned, self.repetition, self.frequency, self.presence)
        return bool(self.masked.size) or any(e.size for e in edits)


def plan_sampling(rows: Sequence[RowSampling], vocab: int) -> SamplingPlan:
    """Return the arrays of `rows`.

    Raises:
        ValueError: an id in a row's parameters is not below the vocabulary, or a mask is too short.
    """
    drawing = [(i, row) for i, row in enumerate(rows) if row.target < 0]
    for _, row in drawing:
        _check_mask(row, vocab)
    penalties = _penalties(drawing, vocab)
    filtered = [(i, row.params) for i, row in drawing if _is_filtered(row)]
    reported = [(i, max(row.logprobs, 0)) for i, row in enumerate(rows) if row.logprobs >= 0 or row.target >= 0]
    targets = np.array([row.target for row in rows], np.int64)
    if targets.size and targets.max() >= vocab:
        raise ValueError(f"target is token {targets.max()}, the vocabulary ends at {vocab - 1}")
    return SamplingPlan(
        bias=_edits(
            ((i, t, b) for i, row in drawing for t, b in (row.params.logit_bias or {}).items()), vocab, "logit_bias"
        ),
        banned=_edits(((i, t, 0.0) for i, row in drawing for t in sorted(set(row.banned))), vocab, "banned"),
        repetition=penalties[0],
        frequency=penalties[1],
        presence=penalties[2],
        masked=np.array([i for i, row in drawing if row.mask is not None or _allowed(row) is not None], np.int64),
        scale=np.array([0.0 if row.params.temperature < COLDEST else _LOG2_E / row.params.temperature for row in rows]),
        words=stream_words([row.seed for row in rows], [row.position for row in rows]),
        targets=targets,
        filtered=np.array([i for i, _ in filtered], np.int64),
        top_k=np.array([p.top_k or vocab for _, p in filtered], np.int64),
        top_p=np.array([p.top_p for _, p in filtered]),
        min_p=np.array([p.min_p for _, p in filtered]),
        hosted=tuple(i for i, row in drawing if _is_hosted(row)),
        reported=np.array([i for i, _ in reported], np.int64),
        n_top=np.array([min(n, vocab) for _, n in reported], np.int64),
    )


def gather_masks(plan: SamplingPlan, rows: Sequence[RowSampling], vocab: int) -> UInt32:
    """Return the bit masks of `plan.masked`, uint32 (m, words). To be called when `StepBatch.masks_ready` has returned."""
    masks = [_mask(rows[i], vocab) for i in plan.masked.tolist()]
    return np.stack(masks) if masks else np.empty((0, 0), np.uint32)


def stream_words(seeds: Sequence[int], positions: Sequence[int]) -> Int64:
    """Random number `position` of each `seed`'s stream as (low, high) 32 bits: Philox4x32-10 of all rows at once, (n, 2)."""
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], np.uint64)
    place = np.array([p & 0xFFFFFFFFFFFFFFFF for p in positions], np.uint64)
    k0, k1 = seed & _LOW, seed >> _SHIFT
    c0, c1 = place & _LOW, place >> _SHIFT
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return np.stack([c0, c1], axis=1).astype(np.int64)


def _is_hosted(row: RowSampling) -> bool:
    return row.params.typical_p < 1.0 and row.params.temperature >= COLDEST


def _is_filtered(row: RowSampling) -> bool:
    p = row.params
    return p.temperature >= COLDEST and not _is_hosted(row) and bool(p.top_k or p.top_p < 1.0 or p.min_p > 0.0)


def _allowed(row: RowSampling) -> tuple[int, ...] | None:
    return row.params.allowed_token_ids


def _check_mask(row: RowSampling, vocab: int) -> None:
    words = -(-vocab // 32)
    if row.mask is not None and row.mask.size < words:
        raise ValueError(f"the mask has {row.mask.size} words, a vocabulary of {vocab} needs {words}")
    _checked(np.asarray(_allowed(row) or (), np.int64), vocab, "allowed_token_ids")


def _mask(row: RowSampling, vocab: int) -> UInt32:
    """The row's mask and its list of allowed tokens as one bit mask."""
    words = -(-vocab // 32)
    mask = np.full(words, 0xFFFFFFFF, np.uint32)
    if row.mask is not None:
        mask &= row.mask[:words]
    allowed = _allowed(row)
    if allowed is not None:
        bits = np.zeros(words * 32, np.uint8)
        bits[np.asarray(allowed, np.int64)] = 1
        mask &= np.packbits(bits, bitorder="little").view("<u4")
    return mask


def _penalties(drawing: Sequence[tuple[int, RowSampling]], vocab: int) -> tuple[Edits, Edits, Edits]:
    """Repetition, frequency and presence of all rows."""
    repetition: list[tuple[int, int, float]] = []
    frequency: list[tuple[int, int, float]] = []
    presence: list[tuple[int, int, float]] = []
    for i, row in drawing:
        history = _checked(np.asarray(row.history, np.int64), vocab, "history")
        if row.params.repetition_penalty != 1.0:
            repetition += [(i, t, row.params.repetition_penalty) for t in np.unique(history).tolist()]
        if row.params.frequency_penalty == 0.0 and row.params.presence_penalty == 0.0:
            continue
        ids, counts = np.unique(history[row.n_prompt :], return_counts=True)
        if row.params.frequency_penalty != 0.0:
            steps = np.float32(row.params.frequency_penalty) * counts.astype(np.float32)
            frequency += [(i, t, v) for t, v in zip(ids.tolist(), steps.tolist(), strict=True)]
        if row.params.presence_penalty != 0.0:
            presence += [(i, t, row.params.presence_penalty) for t in ids.tolist()]
    return _edits(repetition, vocab, "history"), _edits(frequency, vocab, "history"), _edits(presence, vocab, "history")


def _edits(entries: Iterable[tuple[int, int, float]], vocab: int, name: str) -> Edits:
    found = list(entries)
    tokens = _checked(np.array([token for _, token, _ in found], np.int64), vocab, name)
    rows = np.array([row for row, _, _ in found], np.int64)
    return Edits(rows, tokens, np.array([value for _, _, value in found], np.float32))


def _checked(tokens: Int64, vocab: int, name: str) -> Int64:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
        wrong = tokens[(tokens < 0) | (tokens >= vocab)][0]
        raise ValueError(f"{name} names token {wrong}, the vocabulary ends at {vocab - 1}")
    return tokens
