"""What the device must know of a batch: integer arrays, made on the host and sent in one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from sagellm_backend.base import BLOCK_SIZE, StepBatch

__all__ = ["DeviceStep", "StepPlan", "follow", "plan_step", "send", "upload"]

Int32 = npt.NDArray[np.int32]


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


def plan_step(batch: StepBatch, short_rows: int, long_rows: int) -> StepPlan:
    """Lay out a batch.

    Args:
        batch: checked.
        short_rows: rows of a short tile; a sequence with no more rows goes there.
        long_rows: rows of a long tile; 0 sends everything to short ones.
    """
    positions = batch.positions
    of_row = np.repeat(np.arange(batch.lengths.size), batch.lengths)
    blocks = batch.block_tables[of_row, positions // BLOCK_SIZE]
    is_short = (batch.lengths <= short_rows) | (long_rows == 0)
    return StepPlan(
        tokens=np.asarray(batch.token_ids, np.int32),
        positions=positions,
        slots=(blocks * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32),
        starts=np.asarray(batch.starts, np.int32),
        firsts=(np.cumsum(batch.lengths) - batch.lengths).astype(np.int32),
        lengths=np.asarray(batch.lengths, np.int32),
        tables=np.ascontiguousarray(batch.block_tables, np.int32),
        short=_tiles(batch.lengths, np.flatnonzero(is_short), short_rows),
        long=_tiles(batch.lengths, np.flatnonzero(~is_short), long_rows),
        logit_rows=np.asarray(batch.logit_rows, np.int32),
    )


def upload(plan: StepPlan, device: str) -> DeviceStep:
    """Send a plan to the device in one copy that the host does not wait for."""
    arrays = [getattr(plan, field.name) for field in fields(StepPlan)]
    packed = send(np.concatenate([array.reshape(-1) for array in arrays]), device)
    parts = torch.split(packed, [array.size for array in arrays])
    return DeviceStep(*(part.view(array.shape) for part, array in zip(parts, arrays, strict=True)))


def send(array: npt.NDArray[np.generic], device: str | torch.device) -> torch.Tensor:
    """Copy an array to the device without waiting for it: by way of pinned memory, which torch keeps until it has arrived."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def follow(tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Put what was drawn before in the place of negative ids; a row that could not draw goes on with token 0, to no use."""
    return torch.where(tokens < 0, last[(-1 - tokens).clamp(min=0)].clamp(min=0), tokens)


def _tiles(lengths: Int32, sequences: npt.NDArray[np.int64], rows: int) -> Int32:
    """(sequence, first row) of every tile, longest sequences' tiles in order."""
    counts = -(-lengths[sequences] // max(rows, 1))
    owners = np.repeat(sequences, counts)
    nth = np.arange(owners.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([owners, nth * rows], axis=1).astype(np.int32)
