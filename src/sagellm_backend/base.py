"""The narrow waist between an engine and a device.

An engine knows blocks and token ids; a device knows tensors. Between them lie two verbs: `Backend.load` and `Runner.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Weights
from sagellm_protocol.errors import SageError
from sagellm_protocol.sampling import SamplingParams

__all__ = [
    "BLOCK_SIZE",
    "Backend",
    "Capability",
    "KVSpace",
    "LoadOptions",
    "MemoryInfo",
    "RowSampling",
    "Runner",
    "SequenceFailure",
    "StepBatch",
    "StepResult",
]

BLOCK_SIZE = 16
"""Tokens a KV block."""

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to place a model on a device.

    Attributes:
        n_blocks: KV blocks to hold, each of `BLOCK_SIZE` tokens for all layers.
        more_blocks: how many more there may be, where a backend measures what it needs and finds that they fit.
        max_rows: most rows of one step.
        max_logit_rows: most rows of one step that need logits.
        threads: 0 is as many as the affinity mask and the cgroup quota allow.
        quant: ``auto`` keeps the file's precision; else weights are quantised at load.
        kv_dtype: of the KV cache; ``auto`` is the backend's default.
        cache_dir: where repacked weights may be kept; None keeps nothing.
    """

    n_blocks: int
    max_rows: int = 512
    max_logit_rows: int = 64
    threads: int = 0
    quant: Literal["auto", "q4", "q8", "bf16", "f32"] = "auto"
    kv_dtype: Literal["auto", "f32", "bf16", "int8"] = "auto"
    cache_dir: str | None = None
    more_blocks: int = 0


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How to draw the token that follows one row; the exact algorithm is docs/design/0030-sampling-stream.md.

    Attributes:
        params: the request's parameters (strings in them are the engine's business, not the device's).
        seed: resolved seed of the sequence.
        position: number of tokens that the sequence has emitted so far. Draw number `position` of `seed`'s stream is used,
            so the result depends neither on the batch nor on the engine.
        history: prompt and output ids so far, for penalties; may be empty when no penalty is on.
        n_prompt: how many of `history` are prompt.
        mask: allowed tokens as a bit mask, uint32[ceil(vocab / 32)], bit t % 32 of word t // 32; None allows all. It is not
            read before `StepBatch.masks_ready` has returned.
        banned: ids that must not be drawn here (end of sequence before min_tokens, bad words).
        logprobs: number of alternatives to report; -1 reports no log-probability at all.
        target: report the log-probability of this id (instead of drawing one): re-scoring and prompt_logprobs.
    """

    params: SamplingParams
    seed: int = 0
    position: int = 0
    history: Int32 | Sequence[int] = ()
    n_prompt: int = 0
    mask: npt.NDArray[np.uint32] | None = None
    banned: tuple[int, ...] = ()
    logprobs: int = -1
    target: int = -1


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows of several sequences, one after another; prefill chunks and decode rows mix freely.

    Attributes:
        token_ids: int32[rows].
        starts: int32[sequences], position of each sequence's first row, which is also how many of its tokens are in KV.
        lengths: int32[sequences], rows of each sequence; they sum to `rows`.
        block_tables: int32[sequences, width], block b of a sequence holds positions 16·b … 16·b + 15; unused entries are -1.
        logit_rows: int32[n], ascending flat indices of the rows whose next token is wanted.
        sampling: n entries, one for each of `logit_rows`; none at all with `want_hidden` alone, and then no logits are
            computed and `logit_rows` may be as many as the rows (embeddings).
        want_logits: also return the raw logits (tests, scoring).
        want_hidden: also return the final-norm hidden state of each of `logit_rows` (embeddings).
        adapters: int32[sequences], the number of each sequence's adapter (see `sagellm_backend.adapter`) or -1; None is -1 for
            all. A runner that takes no adapters refuses others than None with ValueError.
        masks_ready: called once by a step that draws, after the layers have run: it returns when all masks are written, which
            is done beside the layers. What it raises, the step raises. None if they are written already.
    """

    token_ids: Int32
    starts: Int32
    lengths: Int32
    block_tables: Int32
    logit_rows: Int32
    sampling: Sequence[RowSampling]
    want_logits: bool = False
    want_hidden: bool = False
    adapters: Int32 | None = None
    masks_ready: Callable[[], None] | None = None

    @property
    def positions(self) -> Int32:
        """int32[rows]: the position of each row in its sequence."""
        ends = np.cumsum(self.lengths, dtype=np.int32)
        offsets = np.arange(self.token_ids.size, dtype=np.int32) - np.repeat(ends - self.lengths, self.lengths)
        return offsets + np.repeat(self.starts, self.lengths)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives for each of the n `logit_rows`.

    Attributes:
        token_ids: int32[n], drawn (or the target); -1 where every token is masked or no logit is finite: that sequence
            has failed, the others have not.
        logprobs: float32[n], natural log, of the raw distribution; NaN where not asked for.
        top_ids, top_logprobs: [n, k], most likely first, ties by lower id; k is the most that any row asked for, and a
            row that asked for fewer is padded with -1 and NaN.
        logits: float32[n, vocab] if asked for.
        hidden: float32[n, d_model] if asked for.
    """

    token_ids: Int32
    logprobs: Float32
    top_ids: Int32 = field(default_factory=lambda: np.empty((0, 0), np.int32))
    top_logprobs: Float32 = field(default_factory=lambda: np.empty((0, 0), np.float32))
    logits: Float32 | None = None
    hidden: Float32 | None = None


class SequenceFailure(Exception):
    """Raised by `Runner.step` when one sequence of the batch cannot go on although the others can.

    Attributes:
        index: which sequence of the batch.
        error: why, for the client.
    """

    def __init__(self, index: int, error: SageError) -> None:
        super().__init__(f"sequence {index}: {error.message}")
        self.index = index
        self.error = error


@runtime_checkable
class KVSpace(Protocol):
    """The device's KV cache, by block number 0 … n_blocks - 1."""

    @property
    def n_blocks(self) -> int:
        """Blocks that it holds."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers, K and V."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) pairs, in order."""
        ...

    def export_blocks(self, blocks: Sequence[int]) -> bytes:
        """Return the blocks' content, `block_bytes` each; lossless."""
        ...

    def import_blocks(self, blocks: Sequence[int], data: bytes | memoryview) -> None:
        """Fill blocks with exported content.

        Raises:
            ValueError: `data` is not ``len(blocks) * block_bytes`` long.
        """
        ...


@runtime_checkable
class Runner(Protocol):
    """A model on a device."""

    @property
    def spec(self) -> DecoderSpec:
        """What it executes."""
        ...

    @property
    def kv(self) -> KVSpace:
        """Its KV cache."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they lie on the device."""
        ...

    def step(self, batch: StepBatch) -> StepResult:
        """Run one forward pass, write the rows' KV, draw the wanted tokens. Releases the GIL where it computes.

        A row's result is a function of its own sequence only, never of the other rows.

        Raises:
            SequenceFailure: one sequence cannot go on; the engine fails it alone and runs the others again.
        """
        ...

    def close(self) -> None:
        """Free the device's memory. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Bytes of the device that this process may use."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Capability:
    """What a backend can do here.

    `formats` are the precisions that weights are kept in; `kv_dtypes` those of the cache.
    """

    device: str
    formats: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    instruction_set: str = ""
    batch_invariant: bool = False


@runtime_checkable
class Backend(Protocol):
    """A kind of device. Constructed without arguments and without work; found through the entry points `sagellm.backends`."""

    @property
    def name(self) -> str:
        """As in ``--backend``."""
        ...

    def available(self) -> str | None:
        """Return None if it can run here, else why not and what to do."""
        ...

    def capability(self) -> Capability:
        """Return what it can do on this machine."""
        ...

    def memory(self) -> MemoryInfo:
        """Return total and free bytes (the cgroup's limit counts)."""
        ...

    def kv_block_bytes(self, spec: DecoderSpec, kv_dtype: str) -> int:
        """Return the bytes of one KV block, before anything is loaded."""
        ...

    def load(self, spec: DecoderSpec, weights: Weights, options: LoadOptions) -> Runner:
        """Place a model on the device.

        Raises:
            ValueError: a slot of `spec.slots()` is missing in `weights` or has another shape; the message names it.
            UnsupportedError: the spec needs an operation, or the options a precision, that this backend lacks.
        """
        ...
