"""Residual addition and RMSNorm in one pass over a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["residual_norm", "rms_norm"]


@triton.jit
def _residual_norm(
    x, branch, post, weight, out, n_cols, eps, scale,
    HAS_BRANCH: tl.constexpr, HAS_POST: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    live = cols < n_cols
    value = tl.load(x + row * n_cols + cols, live, 0.0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + row * n_cols + cols, live, 0.0).to(tl.float32)
        if HAS_POST:
            mean = tl.sum(added * added, 0) / n_cols
            added = added * (1.0 / tl.sqrt(mean + eps)) * tl.load(post + cols, live, 0.0)
        value += scale * added
        tl.store(x + row * n_cols + cols, value, live)
    if HAS_NORM:
        mean = tl.sum(value * value, 0) / n_cols
        value = value * (1.0 / tl.sqrt(mean + eps)) * tl.load(weight + cols, live, 0.0)
    tl.store(out + row * n_cols + cols, value.to(out.dtype.element_ty), live)


def residual_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    post: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add ``scale · norm(branch)`` to `x` (f32, in place); return the sum's norm in `dtype`."""
    rows, cols = x.shape
    out = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(cols)
    _residual_norm[(rows,)](
        x, branch, post, weight, out, cols, eps, scale,
        HAS_BRANCH=branch is not None, HAS_POST=post is not None, HAS_NORM=weight is not None, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis of (rows, cols), in the dtype of `x`."""
    rows, cols = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(cols)
    _residual_norm[(rows,)](
        x, None, None, weight, out, cols, eps, 1.0,
        HAS_BRANCH=False, HAS_POST=False, HAS_NORM=True, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)
