"""Where every matrix lies in the weight arena, and in which packed format.

The order is the order of use: one decode step reads the arena once, front to back (embeddings apart). The stacked weights of
experts are split: expert e of slot ``3.experts.up`` is the matrix ``3.experts.up.e``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sagellm_backend.cpu import _native
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Tensor, Weights

__all__ = ["Layout", "Placed", "plan_layout"]

_TARGETS = {"q4": "Q4M", "q8": "Q8", "bf16": "BF16", "f32": "F32"}
_TAIL = 4096
"""Bytes behind the last panel: kernels fetch ahead."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One matrix: `panel_stride` bytes from one panel of 32 outputs to the next, the first at `offset`.

    It is part `index` of `parts` equal parts of the tensor in slot `tensor`.
    """

    slot: str
    tensor: str
    index: int
    parts: int
    packed: str
    outputs: int
    inputs: int
    offset: int = 0
    panel_stride: int = 0

    def part(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The matrix's bytes among those of its tensor."""
        size = data.size // self.parts
        return data[self.index * size : (self.index + 1) * size]


@dataclass(frozen=True, slots=True)
class Layout:
    """All matrices and the size of the arena that holds them."""

    matrices: tuple[Placed, ...]
    nbytes: int


def plan_layout(spec: DecoderSpec, weights: Weights, quant: str) -> Layout:
    """Give every matrix of `spec` its packed format and place. `quant` is that of `LoadOptions`."""
    placed: list[Placed] = []
    end = 0
    for group in _groups(spec, weights, quant):
        sizes = [_native.panel_bytes(m.packed, m.inputs) for m in group]
        for i, m in enumerate(group):
            at = end + sum(sizes[:i])
            placed.append(
                Placed(m.slot, m.tensor, m.index, m.parts, m.packed, m.outputs, m.inputs, at, sum(sizes)),
            )
        end += -(-group[0].outputs // _native.PANEL) * sum(sizes)
    return Layout(tuple(placed), end + _TAIL)


def _groups(spec: DecoderSpec, weights: Weights, quant: str) -> Iterator[list[Placed]]:
    """Matrices whose panels alternate in memory: gate and up, which are read together."""

    def matrix(slot: str) -> Placed:
        tensor = weights[slot]
        outputs, inputs = tensor.shape
        return Placed(slot, slot, 0, 1, _packed_format(slot, tensor, quant), outputs, inputs)

    def expert(slot: str, index: int) -> Placed:
        tensor = weights[slot]
        count, outputs, inputs = tensor.shape
        return Placed(f"{slot}.{index}", slot, index, count, _packed_format(slot, tensor, quant), outputs, inputs)

    for layer in range(spec.n_layers):
        for name in ("q", "k", "v", "o"):
            yield [matrix(f"{layer}.{name}")]
        if spec.experts is not None and layer in spec.expert_layers:
            yield [matrix(f"{layer}.router")]
            for index in range(spec.experts.n_experts):
                yield [expert(f"{layer}.experts.{name}", index) for name in ("gate", "up")]
                yield [expert(f"{layer}.experts.down", index)]
        else:
            yield [matrix(f"{layer}.{name}") for name in ("gate", "up")]
            yield [matrix(f"{layer}.down")]
    if not spec.tied_head:
        yield [matrix("head")]
    yield [matrix("embed")]


def _packed_format(slot: str, tensor: Tensor, quant: str) -> str:
    if slot.endswith(".router"):  # tiny, and its errors send rows to other experts
        return "F32"
    natural: str = _native.natural_format(tensor.format.name)
    if quant == "auto":
        return natural
    if quant == "q4":
        if natural in ("Q4", "Q4M"):
            return natural
        if slot in ("embed", "head"):  # the vocabulary's matrix decides quality: 8 bits, as other runtimes keep it
            return "Q8"
    return _TARGETS[quant]
