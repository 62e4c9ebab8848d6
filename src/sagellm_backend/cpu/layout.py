"""Where every matrix lies in the weight arena, and in which packed format.

The order is the order of use: one decode step reads the arena once, front to back (embeddings apart).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sagellm_backend.cpu import _native
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Tensor, Weights

__all__ = ["Layout", "Placed", "plan_layout"]

_TARGETS = {"q4": "Q4M", "q8": "Q8", "bf16": "BF16", "f32": "F32"}
_TAIL = 4096
"""Bytes behind the last panel: kernels fetch ahead."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One matrix: `panel_stride` bytes from one panel of 32 outputs to the next, the first at `offset`."""

    slot: str
    packed: str
    outputs: int
    inputs: int
    offset: int
    panel_stride: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All matrices and the size of the arena that holds them."""

    matrices: tuple[Placed, ...]
    nbytes: int


def plan_layout(spec: DecoderSpec, weights: Weights, quant: str) -> Layout:
    """Give every matrix of `spec` its packed format and place. `quant` is that of `LoadOptions`."""
    placed: list[Placed] = []
    end = 0
    for group in _groups(spec):
        formats = [_packed_format(slot, weights[slot], quant) for slot in group]
        sizes = [_native.panel_bytes(f, weights[slot].shape[1]) for slot, f in zip(group, formats, strict=True)]
        panels = -(-weights[group[0]].shape[0] // _native.PANEL)
        for i, (slot, packed) in enumerate(zip(group, formats, strict=True)):
            outputs, inputs = weights[slot].shape
            placed.append(Placed(slot, packed, outputs, inputs, end + sum(sizes[:i]), sum(sizes)))
        end += panels * sum(sizes)
    return Layout(tuple(placed), end + _TAIL)


def _groups(spec: DecoderSpec) -> Iterator[tuple[str, ...]]:
    """Matrices whose panels alternate in memory: gate and up, which are read together."""
    for layer in range(spec.n_layers):
        for name in ("q", "k", "v", "o"):
            yield (f"{layer}.{name}",)
        yield f"{layer}.gate", f"{layer}.up"
        yield (f"{layer}.down",)
    if not spec.tied_head:
        yield ("head",)
    yield ("embed",)


def _packed_format(slot: str, tensor: Tensor, quant: str) -> str:
    natural: str = _native.natural_format(tensor.format.name)
    if quant == "auto":
        return natural
    if quant == "q4":
        if natural in ("Q4", "Q4M"):
            return natural
        if slot in ("embed", "head"):  # the vocabulary's matrix decides quality: 8 bits, as other runtimes keep it
            return "Q8"
    return _TARGETS[quant]
