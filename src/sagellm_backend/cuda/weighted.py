"""Integer weights and draws from them, by docs/design/0030-sampling-stream.md.

Weights are integers below 2^44 and a vocabulary is below 2^19, so every sum fits in 63 bits and is exact in any order.
"""

from __future__ import annotations

import torch

from sagellm_backend.sampling import EXP2_COEFFICIENTS

__all__ = ["draw_weighted", "high_product", "integer_weights"]

_LOW = 0xFFFFFFFF
_COLDEST_X = -45.0


def integer_weights(z: torch.Tensor, best: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """floor(2^x · 2^44) with x = (z - best) · scale, int64 (n, vocab); no operation fuses a multiplication and an addition."""
    x = (z.double() - best.double()[:, None]) * scale[:, None]
    live = x >= _COLDEST_X
    x = torch.where(live, x, 0.0)
    n = torch.round(x)
    f = x - n
    p = torch.full_like(f, EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        p = p * f
        p = p + coefficient
    power = ((n.long() + (44 + 1023)) << 52).view(torch.float64)
    return torch.where(live, torch.floor(p * power).long(), 0)


def draw_weighted(weights: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The first id whose running sum exceeds (word · total) >> 64; -1 where all weights are 0. int64 (n,)."""
    running = torch.cumsum(weights, dim=1)
    total = running[:, -1]
    token = (running <= high_product(words, total)[:, None]).sum(dim=1)
    return torch.where(total > 0, token, -1)


def high_product(words: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Upper 64 bits of the 128-bit product of a 64-bit word, (low, high), and a total below 2^63.

    Products of two 32-bit halves fill all 64 bits of an int64, so shifts are masked as if it were unsigned.
    """
    low, high = words[:, 0], words[:, 1]
    total_low, total_high = total & _LOW, total >> 32
    cross = (_upper(low * total_low), low * total_high, high * total_low)
    middle = cross[0] + (cross[1] & _LOW) + (cross[2] & _LOW)
    return high * total_high + _upper(cross[1]) + _upper(cross[2]) + (middle >> 32)


def _upper(product: torch.Tensor) -> torch.Tensor:
    return (product >> 32) & _LOW
