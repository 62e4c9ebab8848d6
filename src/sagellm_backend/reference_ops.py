"""The operations of a transformer in plain numpy, float32.

Batch invariance: a row's numbers must not depend on the rows around it. A BLAS may choose another order of summation for
another matrix shape, and even for another row of the same matrix. So every product here has a fixed shape, and a row has
a fixed place in it: rows lie in tiles of `TILE` at their position modulo `TILE`, attended keys in spans of `SPAN` from
position 0 on. Padding adds exact zeros.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.spec import ExpertSpec, RopeSpec

__all__ = [
    "SPAN",
    "TILE",
    "Tiling",
    "activate",
    "attend",
    "erf",
    "layer_norm",
    "rms_norm",
    "rotate",
    "route",
    "softcap",
    "softmax",
]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

TILE = 16
"""Rows of a matrix product."""

SPAN = 256
"""Keys of one attention product; a multiple of `BLOCK_SIZE`."""

_ERF_NUMERATOR = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_DENOMINATOR = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


class Tiling:
    """Where the rows of a batch lie in tiles; rows of several sequences share a tile where their places are free.

    Args:
        positions: (rows,), the position of each row in its sequence.
    """

    def __init__(self, positions: Int32 | Int64) -> None:
        self._positions = positions
        places = positions % TILE
        tile_of_row = np.zeros(positions.size, np.int64)
        for place in range(TILE):
            rows = places == place
            tile_of_row[rows] = np.arange(np.count_nonzero(rows))
        self._slots = tile_of_row * TILE + places
        self._tiles = int(tile_of_row.max(initial=-1)) + 1

    def of(self, rows: npt.NDArray[np.integer]) -> Tiling:
        """Return the tiling of some of the rows."""
        return Tiling(self._positions[rows])

    def linear(self, x: Float32, weight: Float32, bias: Float32 | None = None) -> Float32:
        """``x @ weight.T + bias``: (rows, inputs) and (outputs, inputs) -> (rows, outputs)."""
        padded = np.zeros((self._tiles, TILE, x.shape[1]), np.float32)
        padded.reshape(-1, x.shape[1])[self._slots] = x
        out = np.empty((self._tiles, TILE, weight.shape[0]), np.float32)
        for tile, product in zip(padded, out, strict=True):
            np.matmul(tile, weight.T, out=product)
        picked: Float32 = out.reshape(-1, weight.shape[0])[self._slots]
        return picked if bias is None else picked + bias


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """Root-mean-square norm over the last axis (Zhang & Sennrich, 2019)."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    out: Float32 = x * (np.float32(1) / np.sqrt(mean_square + np.float32(eps))) * weight
    return out


def softcap(x: Float32, cap: float) -> Float32:
    """Bound x smoothly: cap · tanh(x / cap); the identity for 0."""
    if not cap:
        return x
    out: Float32 = np.float32(cap) * np.tanh(x / np.float32(cap))
    return out


def activate(x: Float32, kind: Literal["silu", "gelu_tanh", "gelu", "relu", "tanh"]) -> Float32:
    """Activation function by name."""
    if kind == "silu":
        return x * _sigmoid(x)
    if kind == "gelu_tanh":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return _half_of(x, np.tanh(inner))
    if kind == "gelu":
        return _half_of(x, erf(x.astype(np.float64) * math.sqrt(0.5)).astype(np.float32))
    if kind == "relu":
        return np.maximum(x, np.float32(0))
    return np.tanh(x)


def erf(x: Float64) -> Float64:
    """Error function: the rational minimax that Eigen and XLA use for float32, exact to 7e-8."""
    clipped = np.clip(x, -4.0, 4.0)
    square = clipped * clipped
    out: Float64 = clipped * np.polyval(_ERF_NUMERATOR, square) / np.polyval(_ERF_DENOMINATOR, square)
    return out


def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    """Layer norm over the last axis (Ba et al., 2016)."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True)
    out: Float32 = centred * (np.float32(1) / np.sqrt(variance + np.float32(eps))) * weight + bias
    return out


def softmax(x: Float32) -> Float32:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: Float32 = e / e.sum(axis=-1, keepdims=True)
    return out


def _half_of(x: Float32, y: Float32) -> Float32:
    out: Float32 = np.float32(0.5) * x * (np.float32(1) + y)
    return out


def _sigmoid(x: Float32) -> Float32:
    """1 / (1 + e^-x) without overflow."""
    e = np.exp(-np.abs(x))
    out: Float32 = np.divide(np.where(x >= 0, np.ones_like(e), e), np.float32(1) + e)
    return out


def rotate(x: Float32, positions: Int32, rope: RopeSpec) -> Float32:
    """Rotary embedding of (rows, heads, head_dim); angles are computed in float64."""
    half = rope.dim // 2
    frequencies = rope.theta ** (-np.arange(half, dtype=np.float64) / half)
    if rope.inv_freq_factors is not None:
        frequencies = frequencies / np.asarray(rope.inv_freq_factors)
    angles = (positions[:, None] * rope.position_scale) * frequencies
    cos = (np.cos(angles) * rope.magnitude_scale).astype(np.float32)[:, None, :]
    sin = (np.sin(angles) * rope.magnitude_scale).astype(np.float32)[:, None, :]
    if rope.layout == "half":
        first, second = slice(0, half), slice(half, rope.dim)
    else:
        first, second = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def route(logits: Float32, experts: ExpertSpec) -> tuple[Int64, Float32]:
    """Router logits (rows, n_experts) -> chosen experts and their weights, (rows, top_k) each; ties by lower number."""
    shares = softmax(logits)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : experts.top_k]
    weights = np.take_along_axis(shares, chosen, axis=-1)
    if experts.normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return chosen, weights


def attend(
    q: Float32,
    k_blocks: Float32,
    v_blocks: Float32,
    table: Int32,
    start: int,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
) -> Float32:
    """Causal attention of one sequence's rows over its paged keys, the rows' own included.

    Softmax is accumulated span by span (Milakov & Gimelshein, 2018), so memory does not grow with the context.

    Args:
        q: (rows, heads, head_dim), of positions start, start + 1, …
        k_blocks: (n_blocks, BLOCK_SIZE, kv_heads, head_dim), the keys of one layer.
        v_blocks: the values, alike.
        table: block b of the sequence is number ``table[b]``.
        start: position of the first row.
        scale: factor of q·k.
        window: tokens seen, the row's own included; 0 sees all.
        cap: soft cap of the scaled scores; 0 is off.

    Returns:
        (rows, heads, head_dim).
    """
    rows, heads, head_dim = q.shape
    borders = [0, *range(TILE - start % TILE, rows, TILE), rows]
    tiles = [_Tile(q[a:b], start + a, k_blocks.shape[2], scale) for a, b in pairwise(borders)]
    low = max(0, start - window + 1) if window else 0
    for span in range(low // SPAN, (start + rows - 1) // SPAN + 1):
        keys = _gather(k_blocks, table, span, start + rows).transpose(1, 2, 0)
        values = _gather(v_blocks, table, span, start + rows).transpose(1, 0, 2)
        keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        positions = np.arange(span * SPAN, (span + 1) * SPAN)
        for tile in tiles:
            tile.see(keys, values, positions, window, cap)
    return np.concatenate([tile.result() for tile in tiles]).reshape(rows, heads, head_dim)


def _gather(blocks: Float32, table: Int32, span: int, end: int) -> Float32:
    """Positions span·SPAN … of a sequence of `end` tokens, (SPAN, kv_heads, head_dim); zeros behind the end."""
    out = np.zeros((SPAN, *blocks.shape[2:]), np.float32)
    count = min(SPAN, end - span * SPAN)
    first = span * SPAN // BLOCK_SIZE
    numbers = table[first : first + -(-count // BLOCK_SIZE)]
    out[:count] = blocks[numbers].reshape(-1, *blocks.shape[2:])[:count]
    return out


class _Tile:
    """Running softmax of the query rows of one tile; arrays are (kv_heads, TILE · queries per KV head, …)."""

    def __init__(self, q: Float32, start: int, kv_heads: int, scale: float) -> None:
        rows, heads, head_dim = q.shape
        self._group = heads // kv_heads
        self._places = slice(start % TILE, start % TILE + rows)
        padded = np.zeros((TILE, kv_heads, self._group, head_dim), np.float32)
        padded[self._places] = q.reshape(rows, kv_heads, self._group, head_dim)
        self._q = padded.transpose(1, 0, 2, 3).reshape(kv_heads, TILE * self._group, -1) * np.float32(scale)
        self._first, self._last = start, start + rows - 1
        self._positions = np.repeat(start - start % TILE + np.arange(TILE), self._group)[:, None]
        self._peak: Float32 = np.full((kv_heads, TILE * self._group, 1), -np.inf, np.float32)
        self._total = np.zeros_like(self._peak)
        self._sum = np.zeros_like(self._q)

    def see(self, keys: Float32, values: Float32, positions: Int64, window: int, cap: float) -> None:
        """Attend to one span: keys (kv_heads, head_dim, SPAN), values (kv_heads, SPAN, head_dim)."""
        if positions[0] > self._last or (window and positions[-1] <= self._first - window):
            return
        visible = positions <= self._positions
        if window:
            visible &= positions > self._positions - window
        scores: Float32 = np.where(visible, softcap(self._q @ keys, cap), np.float32(-np.inf))
        peak = np.maximum(self._peak, scores.max(axis=-1, keepdims=True))
        # A row that has seen nothing yet keeps a peak of -inf; 0 stands in for it, so that -inf - -inf does not occur.
        base = np.where(np.isfinite(peak), peak, np.zeros_like(peak))
        shares = np.exp(scores - base)
        fade = np.exp(self._peak - base)
        self._total *= fade
        self._total += shares.sum(axis=-1, keepdims=True)
        self._sum *= fade
        self._sum += shares @ values
        self._peak = peak

    def result(self) -> Float32:
        """(rows, heads · head_dim)."""
        total = np.where(self._total > 0, self._total, np.ones_like(self._total))  # padding may have seen no key
        out = np.divide(self._sum, total).reshape(total.shape[0], TILE, self._group, -1).transpose(1, 0, 2, 3)
        return out[self._places].reshape(self._places.stop - self._places.start, -1)
