"""LoRA on the device: the factors of all adapters stacked, each row multiplied with its own in one grouped product."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sagellm_backend.adapter import Adapter
from sagellm_backend.base import StepBatch
from sagellm_backend.cuda.matrix import Matrix
from sagellm_backend.cuda.ops import Routes, TorchOps
from sagellm_backend.cuda.plan import send
from sagellm_backend.cuda.weights import Projection

__all__ = ["AdapterRows", "AdapterStack"]


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The adapters of one step's rows.

    Attributes:
        factors: slot -> A (adapters, rank, inputs) and B (adapters, outputs, rank), zero where an adapter lacks the slot.
        into: which row is multiplied with which A and B.
    """

    factors: dict[str, tuple[Matrix, Matrix]]
    into: Routes

    def add(self, ops: TorchOps, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return `out` = projection(x) with what the adapters add to it."""
        column = 0
        for slot, outputs in projection.slots:
            if slot in self.factors:
                a, b = self.factors[slot]
                out[:, column : column + outputs] += ops.grouped(ops.grouped(x, a, self.into), b, self.into)
            column += outputs
        return out


@dataclass(slots=True)
class AdapterStack:
    """The adapters that are loaded, by number; stacked again when one comes or goes.

    Attributes:
        device, dtype: of the stacked factors.
    """

    device: str
    dtype: torch.dtype
    _loaded: dict[int, Adapter] = field(default_factory=dict)
    _places: dict[int, int] = field(default_factory=dict)
    _factors: dict[str, tuple[Matrix, Matrix]] = field(default_factory=dict)

    def load(self, number: int, adapter: Adapter) -> None:
        """Take in an adapter that fits the model.

        Raises:
            ValueError: the number is negative or in use.
        """
        if number < 0 or number in self._loaded:
            raise ValueError(f"adapter number {number} is negative or in use")
        self._loaded[number] = adapter
        self._stack()

    def unload(self, number: int) -> None:
        """Forget an adapter.

        Raises:
            KeyError: there is none of that number.
        """
        del self._loaded[number]
        self._stack()

    def clear(self) -> None:
        """Forget all."""
        self._loaded, self._places, self._factors = {}, {}, {}

    def rows(self, batch: StepBatch, ops: TorchOps) -> AdapterRows | None:
        """Return what a batch needs; None where no sequence names an adapter.

        Raises:
            ValueError: a sequence names one that is not loaded.
        """
        if batch.adapters is None or not (batch.adapters >= 0).any():
            return None
        for number in np.unique(batch.adapters[batch.adapters >= 0]).tolist():
            if number not in self._loaded:
                raise ValueError(f"a sequence uses adapter {number}, which is not loaded")
        places = [self._places.get(number, -1) for number in batch.adapters.tolist()]
        of_row = send(np.repeat(np.asarray(places, np.int64), batch.lengths), self.device)
        source = torch.arange(of_row.numel(), device=self.device)
        return AdapterRows(self._factors, ops.routes(source, of_row, len(self._places)))

    def _stack(self) -> None:
        self._places = {number: place for place, number in enumerate(sorted(self._loaded))}
        slots = sorted({slot for adapter in self._loaded.values() for slot in adapter.factors})
        self._factors = {slot: self._stacked(slot) for slot in slots}

    def _stacked(self, slot: str) -> tuple[Matrix, Matrix]:
        found = {self._places[n]: a.factors[slot] for n, a in self._loaded.items() if slot in a.factors}
        some_a, some_b = next(iter(found.values()))
        rank = -(-max(a.shape[0] for a, _ in found.values()) // 16) * 16  # kernels want multiples of 16
        a_all = np.zeros((len(self._places), rank, some_a.shape[1]), np.float32)
        b_all = np.zeros((len(self._places), some_b.shape[0], rank), np.float32)
        for place, (a, b) in found.items():
            a_all[place, : a.shape[0]] = a
            b_all[place, :, : b.shape[1]] = b
        up, down = (torch.from_numpy(f).to(self.device, self.dtype) for f in (a_all, b_all))
        return Matrix("dense", up), Matrix("dense", down)
