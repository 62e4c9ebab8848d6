"""``act(gate) · up``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["KINDS", "act", "activate", "tanh"]

KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""Activations as kernels know them."""


@triton.jit
def tanh(x):
    """Of f32, by the exponential of a number that is never positive."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def act(x, KIND: tl.constexpr):
    """One of `KINDS`, of f32."""
    if KIND == 0:
        y = x * tl.sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def _activate(gate_up, out, d_ff, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < d_ff
    gate = tl.load(gate_up + row * 2 * d_ff + col, live, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * d_ff + d_ff + col, live, 0.0).to(tl.float32)
    tl.store(out + row * d_ff + col, (act(gate, KIND) * up).to(out.dtype.element_ty), live)


def activate(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, 2 · d_ff) -> (rows, d_ff)."""
    rows, d_ff = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, d_ff), dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    _activate[(rows, triton.cdiv(d_ff, block))](gate_up, out, d_ff, KIND=KINDS[kind], BLOCK=block)
    return out
