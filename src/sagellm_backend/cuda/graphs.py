"""Decode steps as CUDA graphs, at a ladder of batch sizes.

A size is captured when it comes up for the second time: the first time runs as usual, so that no first token waits, and
warms up the kernels. A batch takes the next larger size; the rows that are too many work on the cache's spare block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.cuda.kv import CudaKV
from sagellm_backend.cuda.ops import TorchOps
from sagellm_backend.cuda.plan import DeviceStep, StepPlan

__all__ = ["Capture", "Captured", "Capturer", "DecodeGraphs", "ladder"]

_MAX_WIDTH = 8192
"""Blocks of one sequence that a graph has room for: 131,072 tokens."""

Captured = Callable[[], torch.Tensor]
"""Runs the captured step again and returns its output, (size, …), which the next run overwrites."""

Capture = Callable[[Callable[[], torch.Tensor]], Captured]


def ladder(most: int) -> list[int]:
    """Batch sizes to capture: powers of two up to 16, then steps that waste at most a sixth of the rows, and `most` itself."""
    sizes = [1, 2, 4, 8]
    step = 8
    while sizes[-1] < most:
        step = max(step, sizes[-1] // 8 // 8 * 8)
        sizes.append(sizes[-1] + step)
    return [*(size for size in sizes if size < most), most]


@dataclass(slots=True)
class _Graph:
    """One size: the arrays that it reads, as views of one buffer, and the captured step."""

    buffer: torch.Tensor
    step: DeviceStep
    replay: Captured | None = None


class DecodeGraphs:
    """Captured decode steps of one model.

    Args:
        run: computes a step: what it gives for each row, (rows, …).
        ops: the operations that it uses.
        kv: the model's cache.
        context_length: positions of the longest sequence that uses graphs.
        sizes: of the batches that are captured, ascending.
        capture: how a step is captured; tests pass one that does without a GPU.
    """

    def __init__(
        self,
        run: Callable[[DeviceStep], torch.Tensor],
        ops: TorchOps,
        kv: CudaKV,
        context_length: int,
        sizes: Sequence[int],
        capture: Capture,
    ) -> None:
        self._run, self._ops, self._kv = run, ops, kv
        self._width = max(1, min(kv.n_blocks, -(-context_length // BLOCK_SIZE), _MAX_WIDTH))
        self._sizes, self._capture = sizes, capture
        # One for all sizes: it is filled before each run.
        shape = (self._sizes[-1], self._width)
        self._tables = torch.full(shape, kv.spare, dtype=torch.int32, device=kv.data.device)
        self._graphs: dict[int, _Graph] = {}
        self._seen: set[int] = set()
        self.replays = 0

    @property
    def captured(self) -> tuple[int, ...]:
        """Batch sizes that are captured."""
        return tuple(sorted(self._graphs))

    def run(self, plan: StepPlan, last: torch.Tensor | None) -> torch.Tensor | None:
        """Return what a decode step gives, (rows, …); None if it has to run without a graph.

        Args:
            plan: the step.
            last: what the step before draws, for negative token ids; None where there are none.
        """
        rows = plan.tokens.size
        if not plan.decodes or plan.tables.shape[1] > self._width:
            return None
        at = bisect_left(self._sizes, rows)
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        if size not in self._seen:
            self._seen.add(size)
            return None
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._prepare(size)
        self._fill(graph, plan, size, last)
        if graph.replay is None:
            graph.replay = self._capture(partial(self._run, graph.step))
        self.replays += 1
        return graph.replay()[:rows]

    def capture_all(self) -> None:
        """Capture every size now, for those who would rather wait at the start than later."""
        for size in self._sizes:
            graph = self._graphs.get(size) or self._prepare(size)
            if graph.replay is None:
                self._graphs[size] = graph
                graph.step.slots.fill_(self._kv.spare * BLOCK_SIZE)
                graph.replay = self._capture(partial(self._run, graph.step))

    def _prepare(self, size: int) -> _Graph:
        device = self._kv.data.device
        buffer = torch.zeros(4 * size, dtype=torch.int32, device=device)
        tokens, positions, slots, starts = torch.split(buffer, size)
        numbers = torch.arange(size, dtype=torch.int32, device=device)
        step = DeviceStep(
            tokens=tokens,
            positions=positions,
            slots=slots,
            starts=starts,
            firsts=numbers,
            lengths=torch.ones_like(numbers),
            tables=self._tables[:size],
            short=torch.stack([numbers, torch.zeros_like(numbers)], dim=1),
            long=torch.empty((0, 2), dtype=torch.int32, device=device),
            logit_rows=numbers,
        )
        return _Graph(buffer, step)

    def _fill(self, graph: _Graph, plan: StepPlan, size: int, last: torch.Tensor | None) -> None:
        """Send a step into the graph's arrays. The tables of the rows that are too many may stay: they are only read."""
        rows, width = plan.tables.shape
        host = np.zeros((4, size), np.int32)
        host[2] = self._kv.spare * BLOCK_SIZE
        host[:, :rows] = plan.tokens, plan.positions, plan.slots, plan.starts
        tables = np.where(plan.tables < 0, self._kv.spare, plan.tables).astype(np.int32)
        graph.buffer.copy_(_staged(host.reshape(-1), graph.buffer), non_blocking=True)
        graph.step.tables[:rows, :width].copy_(_staged(tables, graph.buffer), non_blocking=True)
        if last is not None:
            graph.step.tokens.copy_(self._ops.follow(graph.step.tokens, last))


def _staged(array: npt.NDArray[np.int32], target: torch.Tensor) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if target.is_cuda else tensor


class Capturer:
    """Captures on the GPU, into one pool of memory for all graphs: they run one after another, so they can share it."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], torch.Tensor]) -> Captured:
        """Warm up and capture `run`, which neither waits for the GPU nor depends on the host."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device meanwhile (an export of blocks, another engine) must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay
