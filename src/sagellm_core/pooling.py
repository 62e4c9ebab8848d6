"""Vectors from a decoder: prompts run through it in chunks beside generation, and their hidden states are pooled.

Inputs hold their blocks only while they are computed and take no part in the prefix cache: a pooled vector needs every row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sagellm_backend.base import BLOCK_SIZE, RowSampling, StepBatch
from sagellm_core.batch import adapter_numbers
from sagellm_core.request import SequenceState
from sagellm_core.vectors import check_dimensions, embed_result
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SageError,
    UnsupportedError,
)
from sagellm_protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from sagellm_backend.base import Runner
    from sagellm_core.adapters import AdapterTable
    from sagellm_core.kv_cache import KVCache

__all__ = ["Pooler"]

Float32 = npt.NDArray[np.float32]

_GREEDY = SamplingParams(temperature=0.0, max_tokens=1)


@dataclass(eq=False, slots=True)
class _Job:
    """One request. `done` gets its result or its error, once."""

    request: EmbedRequest
    done: Callable[[EmbedResult | SageError], None]
    queued_at: float
    vectors: list[Float32 | None]
    missing: int


@dataclass(eq=False, slots=True)
class _Input:
    """One sequence of a job while it is computed."""

    job: _Job
    index: int
    seq: SequenceState
    total: npt.NDArray[np.float64] | None = None


@dataclass(slots=True)
class _Chunk:
    """Rows of one input in a step, and which of them are wanted."""

    item: _Input
    n_rows: int
    wanted: list[int] = field(default_factory=list)

    @property
    def completes(self) -> bool:
        """Whether these are the input's last rows."""
        return self.item.seq.computed + self.n_rows == len(self.item.seq.tokens)


class Pooler:
    """Runs embedding requests on an engine's runner; one chunk of rows for each `step`. Called from the step loop only.

    Args:
        runner: the engine's.
        kv: the engine's block pool.
        adapters: the engine's LoRA adapters.
        n_ctx: most tokens of an input.
        max_rows: rows of a step.
        max_logit_rows: rows of a step that may want logits.
        max_waiting: inputs that may queue.
        clock: the engine's.
    """

    def __init__(
        self,
        runner: Runner,
        kv: KVCache,
        adapters: AdapterTable,
        *,
        n_ctx: int,
        max_rows: int,
        max_logit_rows: int,
        max_waiting: int,
        clock: Callable[[], float],
    ) -> None:
        self._runner, self._kv, self._adapters, self._clock = runner, kv, adapters, clock
        self._n_ctx = min(n_ctx, kv.n_blocks * BLOCK_SIZE)
        self._max_rows, self._max_logit_rows, self._max_waiting = max_rows, max_logit_rows, max_waiting
        self._jobs: dict[str, _Job] = {}
        self._waiting: deque[tuple[_Job, int]] = deque()
        self._active: list[_Input] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._active)

    @property
    def holders(self) -> list[SequenceState]:
        """Sequences that hold blocks."""
        return [item.seq for item in self._active]

    @property
    def adapters(self) -> list[str | None]:
        """Names of the adapters that requests use."""
        return [job.request.adapter for job in self._jobs.values()]

    @property
    def n_running(self) -> int:
        """Inputs that are being computed."""
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        """Inputs that are not."""
        return len(self._waiting)

    def add(self, request: EmbedRequest, done: Callable[[EmbedResult | SageError], None]) -> None:
        """Queue a request; `done` is called from a later `step`, `abort` or `fail_all`.

        Raises:
            InvalidArgumentError: a token id out of the vocabulary, too many dimensions, an id that is already here, an
                adapter that is not loaded.
            ContextLengthError: an input does not fit.
            UnsupportedError: a decoder cannot do this task.
            ResourceExhaustedError: the queue is full.
        """
        self._check(request)
        n = len(request.inputs)
        job = self._jobs[request.request_id] = _Job(request, done, self._clock(), [None] * n, n)
        self._waiting.extend((job, index) for index in range(n))

    def abort(self, request_id: str) -> bool:
        """Drop a request; `done` is not called. False if it is not here."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._drop(job)
        return job is not None

    def step(self) -> int:
        """Run one chunk of rows; return how many.

        Raises:
            Exception: whatever the device raises; the inputs of the step stay where they are (see `fail_all`).
        """
        self._expire()
        self._start()
        chunks = self._chunks()
        if not chunks:
            self._refuse_if_stuck()
            return 0
        batch = _batch(chunks)
        result = self._runner.step(batch)
        at = 0
        for chunk in chunks:
            count = len(chunk.wanted)
            rows = slice(at, at + count)
            at += count
            if chunk.item.job.request.task == "logprobs":
                self._take_logprobs(chunk, None if result.logits is None else result.logits[rows])
            else:
                self._take_hidden(chunk, None if result.hidden is None else result.hidden[rows])
            chunk.item.seq.computed += chunk.n_rows
        for chunk in chunks:
            if chunk.item.seq.uncomputed == 0:
                self._complete(chunk.item)
        return int(batch.token_ids.size)

    def fail_all(self, error: SageError) -> None:
        """Give every request that is here the error."""
        for job in list(self._jobs.values()):
            self._fail(job, error)

    # --------------------------------------------------------------- private

    def _check(self, request: EmbedRequest) -> None:
        spec = self._runner.spec
        if request.task == "classify":
            raise UnsupportedError("a decoder has no classifier: use the task logprobs", param="task")
        if request.token_types:
            raise UnsupportedError("a decoder knows no token types: leave them out", param="token_types")
        self._adapters.number(request.adapter)
        check_dimensions(request, spec.d_model)
        if request.request_id in self._jobs:
            raise InvalidArgumentError(f"a request {request.request_id!r} is already here", param="request_id")
        for ids in (*request.inputs, request.target_ids):
            wrong = next((token for token in ids if not 0 <= token < spec.vocab_size), None)
            if wrong is not None:
                raise InvalidArgumentError(
                    f"token id {wrong} is outside of the vocabulary of {spec.vocab_size}", param="input"
                )
        if len(self._waiting) + len(request.inputs) > self._max_waiting:
            raise ResourceExhaustedError(
                f"{len(self._waiting)} inputs are waiting, the queue holds {self._max_waiting}: send fewer, or later",
                retry_after_s=1.0,
            )
        longest = max(len(ids) for ids in request.inputs)
        if longest > self._n_ctx:
            raise ContextLengthError(
                f"an input has {longest} tokens, the engine takes {self._n_ctx}: shorten it", param="input"
            )

    def _expire(self) -> None:
        now = self._clock()
        for job in list(self._jobs.values()):
            limit = job.request.deadline_s
            if limit is not None and now > job.queued_at + limit:
                self._fail(job, DeadlineExceededError(f"the request's deadline of {limit:g} s passed"))

    def _start(self) -> None:
        """Begin inputs in order while blocks for all of their tokens can be had."""
        while self._waiting and sum(item.seq.uncomputed for item in self._active) < self._max_rows:
            job, index = self._waiting[0]
            request = EngineRequest(
                request_id=f"{job.request.request_id}[{index}]",
                prompt_token_ids=job.request.inputs[index],
                sampling=_GREEDY,
            )
            seq = SequenceState.of(request, arrival=0, now=job.queued_at, ageing_s=1.0, root=b"")
            seq.adapter = self._adapters.number(job.request.adapter)
            if not self._kv.grow(seq, len(seq.tokens)):
                return
            self._waiting.popleft()
            self._active.append(_Input(job, index, seq))

    def _refuse_if_stuck(self) -> None:
        """Without a running input, blocks are held by generation: wait for them, unless there never are enough."""
        if self._waiting and not self._active and self._kv.n_used == 0:
            job, index = self._waiting[0]
            needed = self._kv.blocks_for(len(job.request.inputs[index]))
            self._fail(job, ResourceExhaustedError(f"an input needs {needed} KV blocks, {self._kv.n_blocks} exist"))

    def _chunks(self) -> list[_Chunk]:
        """The next rows of the active inputs of one task, oldest first."""
        out: list[_Chunk] = []
        room, logit_rows = self._max_rows, 0
        for item in self._active:
            scoring = item.job.request.task == "logprobs"
            if room == 0 or (out and (out[0].item.job.request.task == "logprobs") != scoring):
                break
            chunk = _Chunk(item, min(room, item.seq.uncomputed))
            chunk.wanted = _wanted(chunk)
            if scoring and logit_rows + len(chunk.wanted) > self._max_logit_rows:
                break
            logit_rows += len(chunk.wanted)
            room -= chunk.n_rows
            out.append(chunk)
        return out

    def _take_hidden(self, chunk: _Chunk, hidden: Float32 | None) -> None:
        if hidden is None:
            raise UnsupportedError("this backend gives no hidden states: it cannot embed", param="backend")
        if hidden.shape[0] == 0:
            return
        item = chunk.item
        if _pooling(item.job.request) != "mean":
            item.total = hidden[0].astype(np.float64)
            return
        # Row after row in float64, so that it does not matter where the chunks end.
        rows = hidden.astype(np.float64)
        item.total = np.add.reduce(rows if item.total is None else np.concatenate([item.total[None], rows]), axis=0)

    def _take_logprobs(self, chunk: _Chunk, logits: Float32 | None) -> None:
        from sagellm_backend.sampling import log_softmax

        if logits is None:
            raise UnsupportedError("this backend gives no logits: it cannot score", param="backend")
        if logits.shape[0]:
            values = log_softmax(logits[0])[list(chunk.item.job.request.target_ids)]
            chunk.item.total = values.astype(np.float64)

    def _complete(self, item: _Input) -> None:
        self._active.remove(item)
        self._kv.release(item.seq)
        job = item.job
        assert item.total is not None
        scale = len(item.seq.tokens) if job.request.task == "embed" and _pooling(job.request) == "mean" else 1
        job.vectors[item.index] = (item.total / scale).astype(np.float32)
        job.missing -= 1
        if job.missing == 0:
            del self._jobs[job.request.request_id]
            vectors = np.stack([vector for vector in job.vectors if vector is not None])
            job.done(embed_result(job.request, vectors, normalize=True))

    def _fail(self, job: _Job, error: SageError) -> None:
        self._drop(job)
        job.done(error)

    def _drop(self, job: _Job) -> None:
        del self._jobs[job.request.request_id]
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not job)
        for item in [item for item in self._active if item.job is job]:
            self._active.remove(item)
            self._kv.release(item.seq)


def _pooling(request: EmbedRequest) -> str:
    """A decoder's last token has seen all others, and is what embedding decoders are trained on."""
    return "last" if request.pooling == "model" else request.pooling


def _wanted(chunk: _Chunk) -> list[int]:
    """Rows of the chunk whose hidden state or logits are needed."""
    request = chunk.item.job.request
    pooling = "last" if request.task == "logprobs" else _pooling(request)
    if pooling == "mean":
        return list(range(chunk.n_rows))
    if pooling == "cls":
        return [0] if chunk.item.seq.computed == 0 else []
    return [chunk.n_rows - 1] if chunk.completes else []


def _batch(chunks: list[_Chunk]) -> StepBatch:
    seqs = [chunk.item.seq for chunk in chunks]
    width = max(len(seq.blocks) for seq in seqs)
    tables = np.full((len(seqs), width), -1, np.int32)
    for table, seq in zip(tables, seqs, strict=True):
        table[: len(seq.blocks)] = seq.blocks
    ids = [t for c in chunks for t in c.item.seq.tokens[c.item.seq.computed : c.item.seq.computed + c.n_rows]]
    lengths = np.array([chunk.n_rows for chunk in chunks], np.int32)
    offsets = np.cumsum(lengths) - lengths
    wanted = [int(offset) + row for offset, chunk in zip(offsets, chunks, strict=True) for row in chunk.wanted]
    scoring = chunks[0].item.job.request.task == "logprobs"
    return StepBatch(
        token_ids=np.array(ids, np.int32),
        starts=np.array([seq.computed for seq in seqs], np.int32),
        lengths=lengths,
        block_tables=tables,
        logit_rows=np.array(wanted, np.int32),
        sampling=[RowSampling(_GREEDY)] * len(wanted) if scoring else [],
        want_logits=scoring,
        want_hidden=not scoring,
        adapters=adapter_numbers(seqs),
    )
