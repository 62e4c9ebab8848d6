"""What the device must know of a batch: integer arrays, made on the host and sent in one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch

from sagellm_backend.base import BLOCK_SIZE, StepBatch

__all__ = ["DeviceStep", "Prompt", "StepPlan", "plan_step", "send", "upload"]

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Many rows of one sequence: its number in the batch, its rows, and how many tokens it then has."""

    sequence: int
    rows: slice
    end: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Arrays of a step, int32.

    Attributes:
        tokens: (rows,); -1 - j stands for what logit row j of the step before drew.
        positions: (rows,), of each row in its sequence.
        slots: (rows,), where its KV goes: block · BLOCK_SIZE + place in the block.
        starts, firsts, lengths: (sequences,): position and number of the first row, and how many rows.
        tables: (sequences, width), numbers of blocks.
        short, long: (tiles, 2), a sequence and the first of its rows in the tile; tiles of few rows (decode) and of many.
        logit_rows: (n,).
        prompts: sequences that are in no tile, for attention that takes one at a time; the host knows them.
    """

    tokens: Int32
    positions: Int32
    slots: Int32
    starts: Int32
    firsts: Int32
    lengths: Int32
    tables: Int32
    short: Int32
    long: Int32
    logit_rows: Int32
    prompts: tuple[Prompt, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether it has one row a sequence, and draws from each."""
        return self.tokens.size == self.lengths.size == self.logit_rows.size


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The same arrays on the device; in a CUDA graph they change under it."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    firsts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    short: torch.Tensor
    long: torch.Tensor
    logit_rows: torch.Tensor
    prompts: tuple[Prompt, ...] = ()


def plan_step(batch: StepBatch, short_rows: int, long_rows: int, prompt_rows: int = 0) -> StepPlan:
    """Lay out a batch.

    Args:
        batch: checked.
        short_rows: rows of a short tile; a sequence with no more rows goes there.
        long_rows: rows of a long tile; 0 sends everything to short ones.
        prompt_rows: a sequence with as many rows is a prompt and goes into no tile; 0 has none.
    """
    positions = batch.positions
    of_row = np.repeat(np.arange(batch.lengths.size), batch.lengths)
    blocks = batch.block_tables[of_row, positions // BLOCK_SIZE]
    is_short = (batch.lengths <= short_rows) | (long_rows == 0)
    is_prompt = batch.lengths >= (prompt_rows or np.iinfo(np.int32).max)
    firsts = (np.cumsum(batch.lengths) - batch.lengths).astype(np.int32)
    return StepPlan(
        tokens=np.asarray(batch.token_ids, np.int32),
        positions=positions,
        slots=(blocks * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32),
        starts=np.asarray(batch.starts, np.int32),
        firsts=firsts,
        lengths=np.asarray(batch.lengths, np.int32),
        tables=np.ascontiguousarray(batch.block_tables, np.int32),
        short=_tiles(batch.lengths, np.flatnonzero(is_short), short_rows),
        long=_tiles(batch.lengths, np.flatnonzero(~is_short & ~is_prompt), long_rows),
        logit_rows=np.asarray(batch.logit_rows, np.int32),
        prompts=tuple(
            Prompt(i, slice(int(firsts[i]), int(firsts[i] + batch.lengths[i])), int(batch.starts[i] + batch.lengths[i]))
            for i in np.flatnonzero(is_prompt).tolist()
        ),
    )


def upload(plan: StepPlan, device: str) -> DeviceStep:
    """Send a plan to the device in one copy that the host does not wait for."""
    arrays = [getattr(plan, field.name) for field in fields(StepPlan) if field.name != "prompts"]
    packed = send(np.concatenate([array.reshape(-1) for array in arrays]), device)
    parts = torch.split(packed, [array.size for array in arrays])
    step = DeviceStep(*(part.view(array.shape) for part, array in zip(parts, arrays, strict=True)))
    return replace(step, prompts=plan.prompts)


def send(array: npt.NDArray[np.generic], device: str | torch.device) -> torch.Tensor:
    """Copy an array to the device without waiting for it: by way of pinned memory, which torch keeps until it has arrived."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _tiles(lengths: Int32, sequences: npt.NDArray[np.int64], rows: int) -> Int32:
    """(sequence, first row) of every tile, longest sequences' tiles in order."""
    counts = -(-lengths[sequences] // max(rows, 1))
    owners = np.repeat(sequences, counts)
    nth = np.arange(owners.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([owners, nth * rows], axis=1).astype(np.int32)
