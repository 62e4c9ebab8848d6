"""A weight as it lies in its file: a shape, a block format and the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

__all__ = ["Format", "Tensor", "Weights"]


class Format(Enum):
    """Storage formats: (weights a block, bytes a block). The quantised ones are ggml's block formats.

    The third element of BF16 keeps it from being an enum alias of F16.
    """

    F32 = (1, 4)
    F16 = (1, 2)
    BF16 = (1, 2, "bf16")
    Q4_0 = (32, 18)
    Q4_1 = (32, 20)
    Q5_0 = (32, 22)
    Q5_1 = (32, 24)
    Q8_0 = (32, 34)
    Q4_K = (256, 144)
    Q5_K = (256, 176)
    Q6_K = (256, 210)

    @property
    def block(self) -> int:
        """Weights a block."""
        return int(self.value[0])

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        return int(self.value[1])

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`; blocks run along the last axis."""
        return prod(shape) // self.block * self.block_bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """`shape` in row-major order (last axis contiguous, a multiple of the block); `data` the raw bytes, often a mapped file."""

    shape: tuple[int, ...]
    format: Format
    data: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        want = self.format.nbytes(self.shape)
        if self.data.dtype != np.uint8 or self.data.size != want:
            raise ValueError(
                f"a {self.format.name} tensor of shape {self.shape} has {want} bytes, got {self.data.size}"
            )

    @staticmethod
    def of(array: npt.NDArray[np.float32]) -> Tensor:
        """Wrap a float32 array."""
        flat = np.ascontiguousarray(array, dtype=np.float32)
        return Tensor(tuple(flat.shape), Format.F32, flat.reshape(-1).view(np.uint8))


Weights = Mapping[str, Tensor]
"""Slot (see `sagellm_backend.spec`) -> tensor."""

EMPTY: Weights = MappingProxyType({})
