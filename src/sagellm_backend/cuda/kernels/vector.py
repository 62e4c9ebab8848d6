"""``W @ x`` for one row, with what comes before and after it in the same launch.

A decode step of one sequence is bound by the weights' bytes and by the number of launches. The norm before a product needs no pass of its own: ``W @ (norm(x) · g) = (W @ (x · g)) / rms(x)``, and the sum of squares is
gathered on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from sagellm_backend.cuda.kernels.activation import KINDS, act
from sagellm_backend.cuda.kernels.early import await_before, release_next

__all__ = ["TILES", "ProductKey", "VectorTiles", "add_product", "gated_product", "product"]


@dataclass(frozen=True, slots=True)
class VectorTiles:
    """Outputs and inputs of a tile, and how many warps work on it."""

    outputs: int
    inputs: int
    warps: int


@dataclass(frozen=True, slots=True)
class ProductKey:
    """Shape of a product; `gated` has twice as many rows in its matrix as outputs."""

    outputs: int
    inputs: int
    gated: bool


TILES: dict[ProductKey, VectorTiles] = {}
"""Shapes for which other tiles than the usual ones were measured to be better."""


@triton.jit
def _tile(w, at, start, inputs, row_live, N_INPUTS: tl.constexpr):
    place = start + inputs
    return tl.load(
        w + at[:, None] + place[None, :], row_live[:, None] & (place < N_INPUTS)[None, :], 0.0, eviction_policy="evict_first"
    )  # fmt: skip


@triton.jit
def _vector(
    x, gain, w, bias, out, n_outputs, eps, scale,
    N_INPUTS: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    EARLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = cols < n_outputs
    inputs = tl.arange(0, BLOCK_K)
    at = cols.to(tl.int64) * N_INPUTS
    # The weights of the first tile are on their way before x is known, those of the others a tile ahead.
    tile = _tile(w, at, 0, inputs, live, N_INPUTS)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    if GATE >= 0:
        up_at = at + n_outputs.to(tl.int64) * N_INPUTS
        up_tile = _tile(w, up_at, 0, inputs, live, N_INPUTS)
        up_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if EARLY:
        release_next()
        await_before()
    for start in range(0, N_INPUTS, BLOCK_K):
        place = start + inputs
        value = tl.load(x + row * N_INPUTS + place, place < N_INPUTS, 0.0).to(tl.float32)
        if HAS_GAIN:
            squares += value * value
            value = value * tl.load(gain + place, place < N_INPUTS, 0.0)
        following = _tile(w, at, start + BLOCK_K, inputs, live, N_INPUTS)
        acc += tile.to(tl.float32) * value[None, :]
        tile = following
        if GATE >= 0:
            up_following = _tile(w, up_at, start + BLOCK_K, inputs, live, N_INPUTS)
            up_acc += up_tile.to(tl.float32) * value[None, :]
            up_tile = up_following
    result = tl.sum(acc, 1)
    inverse = 1.0
    if HAS_GAIN:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / N_INPUTS + eps)
        result = result * inverse
    if HAS_BIAS:
        result += tl.load(bias + cols, live, 0.0).to(tl.float32)
    if GATE >= 0:
        result = act(result, GATE) * (tl.sum(up_acc, 1) * inverse)
    place = out + row.to(tl.int64) * n_outputs + cols
    if ADD:
        result = tl.load(place, live, 0.0) + scale * result
    tl.store(place, result.to(out.dtype.element_ty), live)


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 0.0,
    early: bool = False,
) -> torch.Tensor:
    """``norm(x) @ w.T + bias``: x (rows, inputs), w (outputs, inputs); a norm only with its weight `gain`."""
    out = torch.empty((x.shape[0], w.shape[0]), dtype=out_dtype, device=x.device)
    _launch(x, gain, w, bias, out, eps, 1.0, -1, early=early)
    return out


def gated_product(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gain: torch.Tensor,
    kind: Literal["silu", "gelu_tanh", "gelu"],
    out_dtype: torch.dtype,
    *,
    eps: float,
    early: bool = False,
) -> torch.Tensor:
    """``act(norm(x) @ gate.T) · (norm(x) @ up.T)`` of gate and up one below the other: (rows, outputs / 2)."""
    out = torch.empty((x.shape[0], gate_up.shape[0] // 2), dtype=out_dtype, device=x.device)
    _launch(x, gain, gate_up, None, out, eps, 1.0, KINDS[kind], early=early)
    return out


def add_product(
    residual: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    scale: float,
    *,
    bias: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """``residual += scale · (x @ w.T + bias)``, in place, f32 (rows, outputs)."""
    _launch(x, None, w, bias, residual, 0.0, scale, -1, early=early, add=True)


def _launch(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    scale: float,
    gate: int,
    *,
    early: bool,
    add: bool = False,
) -> None:
    key = ProductKey(out.shape[1], x.shape[1], gate >= 0)
    tiles = TILES.get(key) or _usual_tiles(key)
    options = {"launch_pdl": True} if early else {}
    _vector[(x.shape[0], triton.cdiv(key.outputs, tiles.outputs))](
        x, gain, w, bias, out, key.outputs, eps, scale,
        N_INPUTS=x.shape[1], HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, GATE=gate, ADD=add, EARLY=early,
        BLOCK_N=tiles.outputs, BLOCK_K=min(tiles.inputs, triton.next_power_of_2(key.inputs)), num_warps=tiles.warps, **options,
    )  # fmt: skip


def _usual_tiles(key: ProductKey) -> VectorTiles:
    """Few outputs in small parts, so that every multiprocessor has work."""
    if key.gated:
        return VectorTiles(4, 512, 4)
    return VectorTiles(4, 1024, 4) if key.outputs < 4096 else VectorTiles(8, 512, 4)
