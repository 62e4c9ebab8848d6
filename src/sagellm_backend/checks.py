"""What every backend refuses before it computes: missing weights, and batches that do not add up."""

from __future__ import annotations

import numpy as np

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, StepBatch
from sagellm_backend.encoder import EncoderSpec
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Weights

__all__ = ["check_batch", "check_weights"]


def check_weights(spec: DecoderSpec | EncoderSpec, weights: Weights) -> None:
    """Check that `weights` has every slot of `spec` in its shape.

    Raises:
        ValueError: a slot is missing or has another shape; the message names it.
    """
    for slot, shape in spec.slots().items():
        tensor = weights.get(slot)
        if tensor is None:
            raise ValueError(f"{spec.architecture}: weight {slot!r} of shape {shape} is missing")
        if tensor.shape != shape:
            raise ValueError(f"{spec.architecture}: weight {slot!r} has shape {tensor.shape}, the spec needs {shape}")


def check_batch(batch: StepBatch, spec: DecoderSpec, options: LoadOptions) -> None:
    """Check that a batch adds up and stays inside the vocabulary, the KV cache and the limits given at load.

    Raises:
        ValueError: the first thing that is wrong, with its numbers.
    """
    rows, sequences = batch.token_ids.size, batch.lengths.size
    if batch.starts.size != sequences or batch.block_tables.shape[:1] != (sequences,):
        raise ValueError(
            f"{sequences} lengths, {batch.starts.size} starts and block tables of shape {batch.block_tables.shape}: "
            "give one of each per sequence"
        )
    if rows != int(batch.lengths.sum()) or (sequences and batch.lengths.min() < 1):
        raise ValueError(f"{rows} token ids for lengths {batch.lengths.tolist()}: they must be positive and sum to it")
    if rows > options.max_rows:
        raise ValueError(f"a step of {rows} rows is above max_rows = {options.max_rows} given at load")
    if rows and (batch.token_ids.min() < 0 or batch.token_ids.max() >= spec.vocab_size):
        raise ValueError(f"a token id lies outside the vocabulary of {spec.vocab_size}")
    if sequences and batch.starts.min() < 0:
        raise ValueError("a sequence starts at a negative position")
    if batch.adapters is not None and batch.adapters.size != sequences:
        raise ValueError(f"{batch.adapters.size} adapters for {sequences} sequences: give one of each, -1 for none")
    _check_blocks(batch, options.n_blocks)
    _check_logit_rows(batch, rows, options.max_logit_rows)


def _check_blocks(batch: StepBatch, n_blocks: int) -> None:
    needed = -(-(batch.starts + batch.lengths) // BLOCK_SIZE)
    width = batch.block_tables.shape[1] if batch.block_tables.ndim == 2 else 0
    if needed.size and needed.max() > width:
        raise ValueError(f"a sequence needs {needed.max()} blocks, the block tables are {width} wide")
    used = np.arange(width) < needed[:, None]
    bad = used & ((batch.block_tables < 0) | (batch.block_tables >= n_blocks))
    if bad.any():
        sequence, block = (int(i) for i in np.argwhere(bad)[0])
        number = int(batch.block_tables[sequence, block])
        raise ValueError(f"block {block} of sequence {sequence} is number {number}: the cache has 0 to {n_blocks - 1}")


def _check_logit_rows(batch: StepBatch, rows: int, limit: int) -> None:
    wanted = batch.logit_rows
    if wanted.size and (wanted.min() < 0 or wanted.max() >= rows or (np.diff(wanted) <= 0).any()):
        raise ValueError(f"logit_rows must be ascending indices below {rows}")
    if not batch.sampling and batch.want_hidden and not batch.want_logits:
        return  # hidden states only: no logits are computed
    if wanted.size > limit:
        raise ValueError(f"{wanted.size} rows want logits, above max_logit_rows = {limit} given at load")
    if len(batch.sampling) != wanted.size:
        raise ValueError(f"{len(batch.sampling)} sampling entries for {wanted.size} logit rows")
