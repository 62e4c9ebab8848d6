"""A weight matrix as it lies on the device: plain, or packed in groups of 32 along its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["GROUP", "Matrix", "concatenate", "expand", "pack_nibbles", "to_fp8", "to_q4", "to_q8"]

GROUP = 32
"""Weights that share a scale and a minimum; 16 in matrices that come from Q6_K."""

_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Matrix:
    """(outputs, inputs), or (experts, outputs, inputs).

    Attributes:
        kind: what `data` holds. ``dense``: numbers. ``q8``: int8, one a weight. ``q4``: uint8; byte j of a group holds weight j
            in its low half and weight j + 16 in its high one. ``fp8``: e4m3 numbers.
        data: (…, outputs, inputs), half of `inputs` for q4.
        scale: f16 (…, outputs, inputs / group) for q8 and q4; f32 (…, outputs) for fp8.
        minimum: like the scale of q8 and q4, or None where it is zero throughout: weight = quant · scale + minimum.
    """

    kind: Literal["dense", "q8", "q4", "fp8"]
    data: torch.Tensor
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None

    @property
    def outputs(self) -> int:
        """Rows of one matrix."""
        return int(self.data.shape[-2])

    @property
    def inputs(self) -> int:
        """Columns, in weights."""
        return int(self.data.shape[-1]) * (2 if self.kind == "q4" else 1)

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return GROUP if self.scale is None or self.kind == "fp8" else self.inputs // int(self.scale.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.minimum) if t is not None)


def concatenate(parts: Sequence[Matrix]) -> Matrix | None:
    """Return the matrices one below another, or None if they are not of one kind."""
    first = parts[0]
    if len(parts) == 1:
        return first
    shape = {(m.kind, m.data.dtype, m.inputs, m.group, m.minimum is None) for m in parts}
    if len(shape) > 1:
        return None
    axis = first.data.ndim - 2
    scale = None if first.scale is None else torch.cat([_there(m.scale) for m in parts], dim=axis)
    minimum = None if first.minimum is None else torch.cat([_there(m.minimum) for m in parts], dim=axis)
    return Matrix(first.kind, torch.cat([m.data for m in parts], dim=axis), scale, minimum)


def expand(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights as plain numbers, (…, outputs, inputs); computed in float32, then rounded to `dtype`."""
    if matrix.kind == "dense":
        return matrix.data.to(dtype)
    scale = _there(matrix.scale).float()
    if matrix.kind == "fp8":
        return (matrix.data.float() * scale[..., None]).to(dtype)
    groups = _quants(matrix).float() * scale[..., None]
    if matrix.minimum is not None:
        groups = groups + matrix.minimum.float()[..., None]
    return groups.flatten(-2).to(dtype)


def _quants(matrix: Matrix) -> torch.Tensor:
    """(…, outputs, groups, group) integers."""
    if matrix.kind == "q8":
        return matrix.data.unflatten(-1, (-1, matrix.group))
    packed = matrix.data.unflatten(-1, (-1, GROUP // 2))
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def to_q8(values: torch.Tensor) -> Matrix:
    """Round to 8 bits as ggml's Q8_0 does."""
    groups = values.float().unflatten(-1, (-1, GROUP))
    d = groups.abs().amax(dim=-1, keepdim=True) / 127
    scaled = groups * _inverse(d)
    quants = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)).to(torch.int8)
    return Matrix("q8", quants.flatten(-2), d.squeeze(-1).half())


def to_q4(values: torch.Tensor) -> Matrix:
    """Round to 4 bits with a minimum as ggml's Q4_1 does."""
    groups = values.float().unflatten(-1, (-1, GROUP))
    low = groups.amin(dim=-1, keepdim=True)
    d = (groups.amax(dim=-1, keepdim=True) - low) / 15
    quants = torch.clamp((groups - low) * _inverse(d) + 0.5, max=15).to(torch.uint8)
    return Matrix("q4", pack_nibbles(quants).flatten(-2), d.squeeze(-1).half(), low.squeeze(-1).half())


def to_fp8(values: torch.Tensor) -> Matrix:
    """Round to e4m3 with one scale for each output."""
    rows = values.float()
    scale = rows.abs().amax(dim=-1).clamp(min=1e-12) / _FP8_MAX
    return Matrix("fp8", (rows / scale[..., None]).to(torch.float8_e4m3fn), scale)


def pack_nibbles(quants: torch.Tensor) -> torch.Tensor:
    """(…, 32) numbers below 16 -> (…, 16) bytes."""
    return quants[..., :16] | (quants[..., 16:] << 4)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d != 0, 1 / d, torch.zeros_like(d))


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
