"""Low-rank adapters (LoRA; Hu et al., 2021): several of them beside one model, chosen sequence by sequence.

A weight W of the spec becomes W + B·A for the sequences that name the adapter. A backend that can do that offers `AdapterRunner`;
`StepBatch.adapters` says which sequence uses which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sagellm_backend.spec import DecoderSpec

__all__ = ["ADAPTED", "Adapter", "AdapterRunner", "check_adapter"]

Float32 = npt.NDArray[np.float32]

ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")
"""Weights of a layer that an adapter may change."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter in float32.

    Attributes:
        name: for people.
        factors: slot (see `sagellm_backend.spec`) -> A (rank, inputs) and B (outputs, rank); the scale is in B. Ranks may
            differ from slot to slot.
    """

    name: str
    factors: Mapping[str, tuple[Float32, Float32]]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(a.nbytes + b.nbytes for a, b in self.factors.values())


@runtime_checkable
class AdapterRunner(Protocol):
    """What a `Runner` that takes adapters offers besides its other methods. Not to be called while a step runs."""

    def load_adapter(self, number: int, adapter: Adapter) -> None:
        """Make `adapter` known as `number`, which is not in use.

        Raises:
            ValueError: a slot is not one that can be adapted, or a factor has the wrong shape; the message names it.
        """
        ...

    def unload_adapter(self, number: int) -> None:
        """Forget an adapter; its number may be used again.

        Raises:
            KeyError: there is none of that number.
        """
        ...


def check_adapter(spec: DecoderSpec, adapter: Adapter) -> None:
    """Check an adapter against the model that it is for.

    Raises:
        ValueError: a slot is not one that can be adapted, or a factor has the wrong shape; the message names it.
    """
    shapes = spec.slots()
    for slot, (a, b) in adapter.factors.items():
        shape = shapes.get(slot)
        if shape is None or slot.partition(".")[2] not in ADAPTED:
            raise ValueError(f"adapter {adapter.name!r} changes {slot!r}: only {', '.join(ADAPTED)} of a layer can be")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape:
            raise ValueError(
                f"adapter {adapter.name!r}: factors of {slot!r} have the shapes {a.shape} and {b.shape}, the weight {shape}"
            )
