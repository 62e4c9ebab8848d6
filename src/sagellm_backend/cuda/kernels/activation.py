"""``act(gate) · up``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["activate", "tanh"]

_KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


@triton.jit
def tanh(x):
    """Of f32, by the exponential of a number that is never positive."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def _activate(gate_up, out, n, d_ff, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    row, col = at // d_ff, at % d_ff
    gate = tl.load(gate_up + row * 2 * d_ff + col, live, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * d_ff + d_ff + col, live, 0.0).to(tl.float32)
    if KIND == 0:
        acted = gate * tl.sigmoid(gate)
    elif KIND == 1:
        acted = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        acted = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + at, (acted * up).to(out.dtype.element_ty), live)


def activate(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """(rows, 2 · d_ff) -> (rows, d_ff)."""
    rows, d_ff = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, d_ff), dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    _activate[(triton.cdiv(out.numel(), block),)](gate_up, out, out.numel(), d_ff, KIND=_KINDS[kind], BLOCK=block)
    return out
