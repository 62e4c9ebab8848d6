"""Room on the device: what a step takes is measured, not guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, RowSampling, StepBatch
from sagellm_backend.cuda.kv import CudaKV
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.spec import DecoderSpec
from sagellm_protocol.errors import ResourceExhaustedError
from sagellm_protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from sagellm_backend.cuda.runner import CudaRunner

__all__ = ["allocate_kv", "check_step_fits", "largest_step"]


def allocate_kv(
    spec: DecoderSpec, n_blocks: int, dtype: torch.dtype, settings: CudaSettings, weight_bytes: int
) -> CudaKV:
    """Return the cache.

    Raises:
        ResourceExhaustedError: the device has no room for it; the message has the numbers.
    """
    if settings.on_gpu:
        torch.cuda.empty_cache()  # what the packing of weights left behind
    try:
        return CudaKV(spec, n_blocks, dtype, settings.device)
    except torch.OutOfMemoryError as error:
        block = 2 * spec.n_layers * spec.n_kv_heads * BLOCK_SIZE * spec.head_dim * dtype.itemsize
        free, total = torch.cuda.mem_get_info(settings.device)
        raise ResourceExhaustedError(
            f"{n_blocks} KV blocks of {block} bytes need {_gib(n_blocks * block)}; beside weights of {_gib(weight_bytes)} "
            f"{_gib(free)} of {_gib(total)} are free: pass a smaller --ctx or --kv-size"
        ) from error


def check_step_fits(runner: CudaRunner, options: LoadOptions) -> None:
    """Run the largest step that the options allow, once: what it takes must be there before the first request comes.

    It also compiles the kernels. Its rows lie in blocks that are overwritten before they are read.

    Raises:
        ResourceExhaustedError: it does not fit; the message has what it took and what would help.
    """
    device = runner.kv.data.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        runner.step(largest_step(options))
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        held = runner.kv.n_blocks * runner.kv.block_bytes
        raise ResourceExhaustedError(
            f"a step of {options.max_rows} rows does not fit: weights take {_gib(runner.weight_bytes)}, KV {_gib(held)}, "
            f"{_gib(free)} of {_gib(total)} are left: pass a smaller --kv-size, or fewer --max-batch-tokens"
        ) from error
    runner.peak_step_bytes = torch.cuda.max_memory_allocated(device) - before


def largest_step(options: LoadOptions) -> StepBatch:
    """A batch of `max_rows` rows (or as many as the cache holds) with as many draws as are allowed."""
    rows = min(options.max_rows, options.n_blocks * BLOCK_SIZE)
    draws = min(options.max_logit_rows, rows)
    return StepBatch(
        token_ids=np.zeros(rows, np.int32),
        starts=np.zeros(1, np.int32),
        lengths=np.array([rows], np.int32),
        block_tables=np.arange(-(-rows // BLOCK_SIZE), dtype=np.int32)[None],
        logit_rows=np.arange(rows - draws, rows, dtype=np.int32),
        sampling=[RowSampling(params=SamplingParams(top_p=0.9))] * draws,
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"
