"""File formats to `Matrix`, on the device: the bytes travel as they lie in the file and are taken apart there.

The layouts are ggml's, as in `sagellm_backend.quant`, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sagellm_backend.cuda.matrix import Matrix, pack_nibbles
from sagellm_backend.tensors import Format

__all__ = ["plain", "unpack"]

_PLAIN = {Format.F32: torch.float32, Format.F16: torch.float16, Format.BF16: torch.bfloat16}

Packed = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def plain(data: torch.Tensor, fmt: Format, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return the numbers of a format that is not packed, as a view of `data` (bytes); None for the others."""
    dtype = _PLAIN.get(fmt)
    return None if dtype is None else data.view(dtype).view(shape)


def unpack(data: torch.Tensor, fmt: Format, shape: tuple[int, ...]) -> Matrix:
    """Return a packed matrix of `shape` from its file's bytes. All keep their quants; scales of K formats are rounded to 16 bits."""
    blocks = data.view(-1, fmt.block_bytes)
    quants, scale, minimum = _UNPACK[fmt](blocks)
    kind = "q8" if quants.dtype == torch.int8 else "q4"
    per_row = (*shape[:-1], -1)
    return Matrix(
        kind,  # type: ignore[arg-type]
        quants.reshape(per_row).contiguous(),
        scale.reshape(per_row).contiguous(),
        None if minimum is None else minimum.reshape(per_row).contiguous(),
    )


def _f16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The half-precision number at byte `at` of each block, (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The 32 bits at byte `at` of each block as the fifth bit of 32 quants."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    bits = (blocks[:, at : at + 4, None] >> shifts) & 1
    return bits.flatten(1) << 4


def _q4_0(blocks: torch.Tensor) -> Packed:
    d = _f16(blocks, 0)
    return blocks[:, 2:], d, d * -8


def _q4_1(blocks: torch.Tensor) -> Packed:
    return blocks[:, 4:], _f16(blocks, 0), _f16(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> Packed:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return quants.to(torch.int8) - 16, _f16(blocks, 0), None


def _q5_1(blocks: torch.Tensor) -> Packed:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return quants.to(torch.int8), _f16(blocks, 0), _f16(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> Packed:
    return blocks[:, 2:].contiguous().view(torch.int8), _f16(blocks, 0), None


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of the 8 groups of a Q4_K or Q5_K block, (blocks, 8) each; see `sagellm_backend.quant`."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=1)
    minima = torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], dim=1)
    scale = scales.float() * _f16(blocks, 0).float()
    minimum = minima.float() * _f16(blocks, 2).float()
    return scale.half(), (-minimum).half()


def _k_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """128 bytes -> (blocks, 8, 32): each run of 32 bytes holds two groups, low nibbles first."""
    runs = packed.reshape(-1, 4, 1, 32)
    return torch.cat([runs & 15, runs >> 4], dim=2).reshape(-1, 8, 32)


def _q4_k(blocks: torch.Tensor) -> Packed:
    return pack_nibbles(_k_nibbles(blocks[:, 16:])), *_k_scales(blocks)


def _q5_k(blocks: torch.Tensor) -> Packed:
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    fifth = (blocks[:, None, 16:48] >> shifts[None, :, None]) & 1
    quants = _k_nibbles(blocks[:, 48:]) | (fifth << 4)
    return quants.to(torch.int8), *_k_scales(blocks)


def _q6_k(blocks: torch.Tensor) -> Packed:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    nibbles = torch.cat([low & 15, low >> 4], dim=2).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], device=blocks.device, dtype=torch.uint8)
    tops = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts[:, None]) & 3
    quants = (nibbles | (tops << 4)).to(torch.int8) - 32
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _f16(blocks, 208).float()
    return quants, scale.half(), None


_UNPACK: dict[Format, Callable[[torch.Tensor], Packed]] = {
    Format.Q4_0: _q4_0,
    Format.Q4_1: _q4_1,
    Format.Q5_0: _q5_0,
    Format.Q5_1: _q5_1,
    Format.Q8_0: _q8_0,
    Format.Q4_K: _q4_k,
    Format.Q5_K: _q5_k,
    Format.Q6_K: _q6_k,
}
