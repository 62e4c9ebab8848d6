"""What all sections share: settings, sizes, a stopwatch and the machine's limits."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from shapes import Sizes

from sagellm_backend.cuda.settings import CudaSettings

__all__ = ["Bench", "Row", "each"]

Row = dict[str, object]


@dataclass
class Bench:
    """One section's surroundings.

    Attributes:
        settings: how the backend runs; on ``cpu`` this is a rehearsal.
        sizes: how large everything is.
        models: real models.
        limits: ``copy_bytes_per_s`` and ``gemm_flops_per_s``, if they were measured before.
    """

    settings: CudaSettings
    sizes: Sizes
    models: list[Path] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where tensors are made."""
        return self.settings.device

    @property
    def dtype(self) -> torch.dtype:
        """Of operands: Triton's interpreter cannot compute in bf16."""
        return torch.bfloat16 if self.settings.on_gpu else torch.float32

    def seconds(self, run: Callable[[], object], repeats: int = 20, warm: int = 3) -> float:
        """Median time of `run` on the device."""
        for _ in range(warm):
            run()
        return statistics.median(self._once(run) for _ in range(repeats))

    def measured(self) -> dict[str, float]:
        """Copy bandwidth (bytes read and written together) and bf16 GEMM rate of this machine."""
        if not self.limits:
            source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            edge = self.sizes.gemm
            a, b = (torch.randn(edge, edge, dtype=torch.bfloat16, device=self.device) for _ in range(2))
            self.limits = {
                "copy_bytes_per_s": 2 * source.numel() / self.seconds(lambda: target.copy_(source)),
                "gemm_flops_per_s": 2 * edge**3 / self.seconds(lambda: a @ b),
            }
        return self.limits

    def tidy(self) -> None:
        """Give unused memory back."""
        if self.settings.on_gpu:
            torch.cuda.empty_cache()

    def _once(self, run: Callable[[], object]) -> float:
        if not self.settings.on_gpu:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def each(cases: Iterable[tuple[str, Callable[[], Iterator[Row]]]]) -> Iterator[Row]:
    """The rows of all cases; one that fails is a row and does not keep the next from its turn."""
    for name, run in cases:
        try:
            yield from run()
        except Exception as error:  # noqa: BLE001, PERF203  whatever it was, the next case must have its turn
            traceback.print_exc()
            yield {"work": name, "value": f"{type(error).__name__}: {error}"[:600], "ok": False}
