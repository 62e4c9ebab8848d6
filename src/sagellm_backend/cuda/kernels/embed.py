"""Tokens that are known only on the device, and rows of the embedding matrix, whatever it is packed in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sagellm_backend.cuda.matrix import Matrix

__all__ = ["KINDS", "embed", "follow"]

KINDS = {"dense": 0, "q8": 1, "q4": 2, "fp8": 3}
"""Kinds of `Matrix` as kernels know them."""


@triton.jit
def _embed(
    table, scales, minima, tokens, out, n_cols, factor,
    KIND: tl.constexpr, HAS_MIN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < n_cols
    if KIND == 2:
        packed = tl.load(table + token * (n_cols // 2) + (cols // GROUP) * (GROUP // 2) + cols % (GROUP // 2), live, 0)
        value = tl.where(cols % GROUP < GROUP // 2, packed & 15, packed >> 4).to(tl.float32)
    else:
        value = tl.load(table + token * n_cols + cols, live, 0.0).to(tl.float32)
    if KIND == 1 or KIND == 2:
        group = token * (n_cols // GROUP) + cols // GROUP
        value = value * tl.load(scales + group, live, 0.0).to(tl.float32)
        if HAS_MIN:
            value += tl.load(minima + group, live, 0.0).to(tl.float32)
    if KIND == 3:
        value = value * tl.load(scales + token)
    tl.store(out + row * n_cols + cols, value * factor, live)


def embed(table: Matrix, tokens: torch.Tensor, factor: float) -> torch.Tensor:
    """Rows `tokens` of `table` times `factor`: f32 (rows, inputs)."""
    rows, cols = tokens.numel(), table.inputs
    out = torch.empty((rows, cols), dtype=torch.float32, device=table.data.device)
    block = min(triton.next_power_of_2(cols), 1024)
    _embed[(rows, triton.cdiv(cols, block))](
        table.data, table.scale, table.minimum, tokens, out, cols, factor,
        KIND=KINDS[table.kind], HAS_MIN=table.minimum is not None, GROUP=table.group, BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n"])
def _follow(tokens, last, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    token = tl.load(tokens + at, live, 0)
    drawn = tl.load(last + tl.maximum(-1 - token, 0), live & (token < 0), 0)
    tl.store(out + at, tl.where(token < 0, tl.maximum(drawn, 0), token), live)


def follow(tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """See `TorchOps.follow`."""
    out = torch.empty_like(tokens)
    _follow[(triton.cdiv(tokens.numel(), 256),)](tokens, last, out, tokens.numel(), BLOCK=256)
    return out
