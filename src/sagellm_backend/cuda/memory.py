"""Room on the device: what a step takes is measured, and the cache gets what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, RowSampling, StepBatch
from sagellm_backend.cuda.kv import CudaKV
from sagellm_backend.spec import DecoderSpec
from sagellm_protocol.errors import ResourceExhaustedError
from sagellm_protocol.sampling import SamplingParams

__all__ = ["GRAPH_ROWS", "GpuMeter", "Meter", "Room", "allocate_kv", "largest_step", "step_refusal", "trial_blocks"]

GRAPH_ROWS = 512
"""Rows of the largest step that is captured as a graph; its arrays are kept beside those of steps that run as usual."""


class Meter(Protocol):
    """What a device says about its memory, in bytes."""

    def free(self) -> tuple[int, int]:
        """Give back what is held unused; return what can be had, and the total."""
        ...

    def begin(self) -> None:
        """Begin to watch."""
        ...

    def peak(self) -> int:
        """Return the most that was held since `begin`, beside what was held then."""
        ...


class GpuMeter:
    """By torch's allocator and the driver.

    Args:
        device: a GPU.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = 0

    def free(self) -> tuple[int, int]:
        """See `Meter`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free), int(total)

    def begin(self) -> None:
        """See `Meter`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = int(torch.cuda.memory_allocated(self._device))

    def peak(self) -> int:
        """See `Meter`."""
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device)) - self._before


@dataclass(frozen=True, slots=True)
class Room:
    """What there is beside the weights, in bytes.

    Attributes:
        free, total: of the device, with the weights on it and without a cache.
        weights: what they take.
        step: the most that the largest step took.
    """

    free: int
    total: int
    weights: int
    step: int

    def blocks(self, options: LoadOptions, block_bytes: int) -> int:
        """Return how many blocks the cache gets: what fits of ``options.n_blocks`` and ``more_blocks`` on top.

        The largest step has to fit beside it, and the captured ones, and a fiftieth of the device for what the driver keeps and
        what is lost between allocations.

        Raises:
            ResourceExhaustedError: fewer than ``options.n_blocks`` fit; the message has the numbers.
        """
        graphs = self.step * min(options.max_rows, GRAPH_ROWS) // options.max_rows
        room = self.free - self.step - graphs - self.total // 50
        if room < options.n_blocks * block_bytes:
            raise ResourceExhaustedError(
                f"{options.n_blocks} KV blocks of {block_bytes} bytes need {_gib(options.n_blocks * block_bytes)}; beside "
                f"weights of {_gib(self.weights)} and a step of {options.max_rows} rows, which takes {_gib(self.step)}, there is "
                f"room for {_gib(max(room, 0))} of {_gib(self.total)}: pass a smaller --ctx or --kv-size, or fewer "
                "--max-batch-tokens"
            )
        return min(options.n_blocks + options.more_blocks, room // block_bytes)


def allocate_kv(spec: DecoderSpec, n_blocks: int, dtype: torch.dtype, device: str) -> CudaKV:
    """Return the cache.

    Raises:
        ResourceExhaustedError: the device refuses; the message has the numbers.
    """
    try:
        return CudaKV(spec, n_blocks, dtype, device)
    except torch.OutOfMemoryError as error:
        block = 2 * spec.n_layers * spec.n_kv_heads * BLOCK_SIZE * spec.head_dim * dtype.itemsize
        free, total = torch.cuda.mem_get_info(device)
        raise ResourceExhaustedError(
            f"{n_blocks} KV blocks of {block} bytes need {_gib(n_blocks * block)}, {_gib(free)} of {_gib(total)} are free: "
            "pass a smaller --ctx or --kv-size"
        ) from error


def trial_blocks(options: LoadOptions) -> int:
    """Return how many blocks the largest step needs."""
    return min(-(-options.max_rows // BLOCK_SIZE), options.n_blocks)


def largest_step(options: LoadOptions) -> StepBatch:
    """A batch of `max_rows` rows (or as many as the cache holds) with as many draws as are allowed, of the dearest kind."""
    rows = min(options.max_rows, options.n_blocks * BLOCK_SIZE)
    draws = min(options.max_logit_rows, rows)
    dear = RowSampling(params=SamplingParams(top_p=0.9, logit_bias={0: 1.0}), logprobs=1)
    return StepBatch(
        token_ids=np.zeros(rows, np.int32),
        starts=np.zeros(1, np.int32),
        lengths=np.array([rows], np.int32),
        block_tables=np.arange(-(-rows // BLOCK_SIZE), dtype=np.int32)[None],
        logit_rows=np.arange(rows - draws, rows, dtype=np.int32),
        sampling=[dear] * draws,
    )


def step_refusal(options: LoadOptions, weights: int, device: str) -> ResourceExhaustedError:
    """What to say when the largest step does not fit even beside the smallest cache."""
    free, total = torch.cuda.mem_get_info(device)
    return ResourceExhaustedError(
        f"a step of {options.max_rows} rows does not fit: weights take {_gib(weights)}, {_gib(free)} of {_gib(total)} are left: "
        "pass fewer --max-batch-tokens, or --quant q4 or q8"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"
