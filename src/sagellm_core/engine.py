"""One engine: sequences in, tokens out, one step at a time. Single-threaded; `sagellm_core.local` gives it a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from sagellm_backend.adapter import Adapter
from sagellm_backend.base import BLOCK_SIZE, Runner, SequenceFailure, StepBatch, StepResult
from sagellm_backend.spec import DecoderSpec
from sagellm_core.adapters import AdapterTable
from sagellm_core.batch import Draw, build_batch, read_result
from sagellm_core.kv_cache import KVCache
from sagellm_core.metrics import EngineMetrics
from sagellm_core.observe import EngineSettings, description, status
from sagellm_core.pooling import Pooler
from sagellm_core.request import GrammarCompiler, Phase, SequenceState
from sagellm_core.scheduler import Schedule, Scheduler, SchedulerLimits, Work
from sagellm_core.speculation import Speculator
from sagellm_core.spill import DiskTier
from sagellm_core.validate import check_request
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import (
    DeadlineExceededError,
    EngineDiedError,
    Error,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SageError,
    UnavailableError,
)
from sagellm_protocol.generation import FinishReason, TokenLogprob
from sagellm_protocol.prefix import BlockEvent, BlockSnapshot, root_hash

__all__ = ["Engine", "EngineSettings"]


class Engine:
    """Continuous batching over one runner.

    Args:
        runner: the model on its device; the engine closes it.
        settings: sizes and names.
        clock: seconds that only grow.
        grammars: compiles `SamplingParams.grammar`; None refuses such requests.
        speculator: guesses tokens ahead; None does not.
        spill: disk tier for evicted blocks; None drops them.
    """

    def __init__(
        self,
        runner: Runner,
        settings: EngineSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarCompiler | None = None,
        speculator: Speculator | None = None,
        spill: DiskTier | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = EngineMetrics()
        self.draining = False
        self.died: SageError | None = None
        self._runner = runner
        self._clock = clock
        self._grammars = grammars
        self._speculator = speculator
        self._spill = spill
        self._kv = KVCache(
            runner.kv.n_blocks,
            BLOCK_SIZE,
            copy=self._copy_block,
            caching=settings.prefix_caching,
            spill=spill,
            clock=time.perf_counter,
        )
        limits = SchedulerLimits(settings.max_rows, settings.max_logit_rows, settings.max_running)
        self._scheduler = Scheduler(self._kv, limits)
        self._adapters = AdapterTable(runner, settings.adapter_bytes)
        self._pooler = Pooler(
            runner,
            self._kv,
            self._adapters,
            n_ctx=settings.n_ctx,
            max_rows=settings.max_rows,
            max_logit_rows=settings.max_logit_rows,
            max_waiting=settings.max_waiting,
            clock=clock,
        )
        self._sequences: dict[str, SequenceState] = {}
        self._compiling: list[SequenceState] = []
        self._outbox: list[TokenDelta] = []
        self._arrivals = 0
        self._failures = 0

    # ------------------------------------------------------------------ life

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return bool(self._sequences or self._outbox or self._pooler.has_work)

    @property
    def stalled(self) -> bool:
        """Whether all that is here waits for its grammar."""
        return bool(self._compiling) and len(self._compiling) == len(self._sequences) and not self._outbox

    def add(self, request: EngineRequest) -> None:
        """Queue one sequence.

        Raises:
            InvalidArgumentError: a duplicate id, a token id out of the vocabulary, an unresolved parameter.
            ContextLengthError: prompt and max_tokens do not fit; the message has the numbers.
            UnsupportedError: something that this engine cannot do, by name.
            ResourceExhaustedError: the queue is full.
            UnavailableError: the engine is draining or dead.
        """
        self._check_open()
        if request.request_id in self._sequences:
            raise InvalidArgumentError(f"a request {request.request_id!r} is already here", param="request_id")
        check_request(request, self._runner.spec.vocab_size, self.settings.n_ctx, self._kv.n_blocks * BLOCK_SIZE)
        constraint = None
        if request.sampling.grammar is not None:
            if self._grammars is None:
                raise InvalidArgumentError("this engine has no grammar compiler: leave grammar out", param="grammar")
            constraint = self._grammars.compile(request.sampling.grammar)
        self._arrivals += 1
        seq = SequenceState.of(
            request,
            arrival=self._arrivals,
            now=self._clock(),
            ageing_s=self.settings.ageing_s,
            root=root_hash(request.adapter, request.cache_salt),
        )
        seq.adapter = self._adapters.number(request.adapter)
        if seq.n_output >= seq.max_length - seq.n_prompt:  # an earlier engine emitted all of it
            self._outbox.append(_with_prompt(TokenDelta(request_id=seq.id, finish_reason="length"), seq))
            self.metrics.finished += 1
            return
        seq.constraint = constraint
        self._sequences[seq.id] = seq
        if constraint is not None:
            seq.blocked = True
            self._compiling.append(seq)
        self._scheduler.add(seq)

    def embed(self, request: EmbedRequest, done: Callable[[EmbedResult | SageError], None]) -> None:
        """Queue an embedding or scoring request; `done` is called from a later `step`, with its result or its error.

        Raises:
            InvalidArgumentError: a token id out of the vocabulary, too many dimensions.
            ContextLengthError: an input does not fit.
            UnsupportedError: a decoder cannot do this task.
            ResourceExhaustedError: the queue is full.
            UnavailableError: the engine is draining or dead.
        """
        self._check_open()
        self._pooler.add(request, done)

    @property
    def spec(self) -> DecoderSpec:
        """What the runner executes."""
        return self._runner.spec

    def load_adapter(self, adapter: Adapter) -> None:
        """Make a LoRA adapter usable under its name.

        Raises:
            InvalidArgumentError: the name is taken.
            UnsupportedError: the backend takes no adapters.
            ResourceExhaustedError: `EngineSettings.adapter_bytes` would be passed.
            ModelFileError: it does not fit the model.
        """
        self._adapters.load(adapter)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, and every cached block: its name may come back with other weights.

        Raises:
            InvalidArgumentError: it is not loaded, or sequences use it.
        """
        self._adapters.unload(
            name, [*(seq.request.adapter for seq in self._sequences.values()), *self._pooler.adapters]
        )
        self._kv.forget()

    def abort_embed(self, request_id: str) -> bool:
        """Drop an embedding request; its `done` is not called. False if unknown."""
        return self._pooler.abort(request_id)

    def abort(self, request_id: str, *, silently: bool = False) -> bool:
        """Let go of a sequence and its blocks, wherever it stands; its last delta says ``cancelled``, or none comes. False if unknown."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._remove(seq)
        self.metrics.aborted += 1
        if not silently:
            self._outbox.append(TokenDelta(request_id=request_id, finish_reason="cancelled"))
        return True

    def step(self) -> list[TokenDelta]:
        """Run one step and return what each sequence gained by it."""
        self._poll_grammars()
        schedule = self._schedule()
        for work, draws in self._run(schedule):
            self._update(work, draws)
        self._pool()
        return self._emit()

    def drain(self) -> None:
        """Take no more sequences; those that are here go on to their end."""
        self.draining = True

    def close(self) -> None:
        """Give the device back. Idempotent."""
        self._fail_all(UnavailableError("the engine was closed"))
        self._pooler.fail_all(UnavailableError("the engine was closed"))
        if self._grammars is not None:
            self._grammars.close()
        if self._speculator is not None:
            self._speculator.close()
        if self._spill is not None:
            self._spill.close()
        self._runner.close()

    # ------------------------------------------------------------ observation

    def describe(self) -> EngineDescription:
        """Return what the engine serves."""
        return description(self.settings, self._runner)

    def status(self) -> EngineStatus:
        """Return what the engine is doing. May be called from any thread, also while a step runs or hangs."""
        return status(
            self.settings,
            self.metrics,
            self._kv,
            self._scheduler,
            self._spill,
            pooling=(self._pooler.n_running, self._pooler.n_waiting),
            draining=self.draining,
            adapters=self._adapters.names,
        )

    def block_events(self, after: int) -> list[BlockEvent]:
        """Return the changes of the prefix cache numbered above `after`."""
        return self._kv.events_after(after)

    def block_snapshot(self) -> BlockSnapshot:
        """Return all that the prefix cache holds."""
        return self._kv.snapshot()

    def clear_cache(self) -> int:
        """Drop all cached blocks; return how many."""
        return self._kv.forget()

    def copy_out(self, names: Sequence[bytes]) -> bytes:
        """Return the content of the cached blocks of these names, up to the first that is not in memory."""
        blocks = self._kv.resident(names)
        return self._runner.kv.export_blocks(blocks) if blocks else b""

    def copy_in(self, blocks: Sequence[tuple[bytes, bytes, tuple[int, ...]]], data: bytes) -> tuple[int, int]:
        """Keep blocks (name, parent's name, token ids) with this content as cached; return how many are new and how many were here.

        Stops where there is no room.
        """
        size, room, present = self._runner.kv.block_bytes, self._kv.n_available, 0
        numbers: list[int] = []
        content: list[memoryview] = []
        for index, (name, parent, token_ids) in enumerate(blocks):
            if self._kv.resident([name]):
                present += 1
                continue
            number = self._kv.insert(name, parent, token_ids) if len(numbers) < room else None
            if number is None:
                break
            numbers.append(number)
            content.append(memoryview(data)[index * size : (index + 1) * size])
        if numbers:
            self._runner.kv.import_blocks(numbers, data if len(numbers) == len(blocks) else b"".join(content))
        return len(numbers), present

    def check_integrity(self) -> None:
        """Check that every block is accounted for: free + cached + used = total.

        Raises:
            AssertionError: an invariant is broken; the message names it.
        """
        self._kv.check_integrity([*self._scheduler.running, *self._pooler.holders])
        assert len(self._sequences) == len(self._scheduler.running) + len(self._scheduler.waiting), "a lost sequence"

    # ------------------------------------------------------- the parts of step

    def _poll_grammars(self) -> None:
        for seq in list(self._compiling):
            try:
                seq.blocked = seq.constraint is not None and not seq.constraint.ready()
            except SageError as error:
                self._fail(seq, error)
            if not seq.blocked and seq in self._compiling:
                self._compiling.remove(seq)

    def _schedule(self) -> Schedule:
        now = self._clock()
        if self._speculator is not None:
            self._speculator.plan(self._scheduler.running)
        schedule = self._scheduler.schedule(now)
        for seq in schedule.expired:
            waited = f"{seq.request.deadline_s:g} s passed with {seq.n_output} tokens emitted"
            self._end(seq, "error", error=DeadlineExceededError(f"the request's deadline of {waited}").to_wire())
        for work in schedule.work.values():
            self.metrics.on_start(work.seq, now)
        return schedule

    def _run(self, schedule: Schedule) -> Iterator[tuple[Work, list[Draw]]]:
        works = list(schedule.work.values())
        if self._speculator is not None:
            self._speculator.propose([work for work in works if work.n_draft])
        started = self._clock()
        while works:
            batch = build_batch(works, self._grammars)
            try:
                result = self._forward(works, batch)
            except SequenceFailure as failure:
                if works[failure.index].draft:
                    works[failure.index].draft.clear()  # it may have been a guess that failed
                else:
                    self._fail(works.pop(failure.index).seq, failure.error)
            except Exception as error:  # noqa: BLE001  the border to the device: whatever it raises must reach the requests
                self._on_failure(works, error)
                break
            else:
                self._failures = 0
                self.metrics.on_step(batch.token_ids.size, self._clock() - started)
                return read_result(works, batch, result)
        return iter(())

    def _forward(self, works: list[Work], batch: StepBatch) -> StepResult:
        try:
            if self._speculator is not None:
                self._speculator.follow(works)
            return self._runner.step(batch)
        finally:  # what fails before it draws leaves masks behind that are still being written
            if batch.masks_ready is not None:
                batch.masks_ready()

    def _update(self, work: Work, draws: list[Draw]) -> None:
        """Take over what the rows of one sequence gave: scores of the prompt, then tokens while the guesses hold."""
        seq = work.seq
        for draw in draws:
            if draw.scored and seq.prompt_logprobs is not None:
                seq.prompt_logprobs.append(draw.logprob)
        drawn = [draw for draw in draws if not draw.scored]
        gained: list[Draw] = []
        reason: FinishReason | None = None
        stop_id: int | None = None
        for ahead, draw in enumerate(drawn):
            if draw.token_id < 0:
                self._advance(work, gained)
                self._fail(seq, InvalidArgumentError("no token is allowed next: bias, masks and bad words exclude all"))
                return
            if seq.stops_at(draw.token_id):
                reason, stop_id = "stop", draw.token_id
                break
            gained.append(draw)
            seq.tokens.append(draw.token_id)
            reason = seq.completed()
            if reason is not None or ahead == len(work.draft) or draw.token_id != work.draft[ahead]:
                break
        self._advance(work, gained)
        if drawn:
            self._speak(seq, gained, reason, stop_id)

    def _pool(self) -> None:
        """Run a chunk of the inputs that are to be embedded, beside generation."""
        if not self._pooler.has_work:
            return
        started = self._clock()
        try:
            n_rows = self._pooler.step()
        except Exception as error:  # noqa: BLE001  the border to the device, as in `_run`
            self._pooler.fail_all(_wire_error(error))
            self._on_failure([], error)
            return
        self._failures = 0
        self.metrics.prompt_tokens += n_rows
        self.metrics.on_step(n_rows, self._clock() - started)

    def _emit(self) -> list[TokenDelta]:
        out, self._outbox = self._outbox, []
        return out

    # --------------------------------------------------------------- private

    def _advance(self, work: Work, gained: list[Draw]) -> None:
        """Note what is in the cache now: the rows, and the guesses that were drawn too."""
        accepted = sum(draw.token_id == guess for draw, guess in zip(gained, work.draft, strict=False))
        if work.draft and self._speculator is not None:
            self.metrics.draft_tokens += len(work.draft)
            self.metrics.accepted_tokens += accepted
            self._speculator.observe(work, accepted)
        self._scheduler.advance(work.seq, work.n_rows + accepted)

    def _speak(self, seq: SequenceState, gained: list[Draw], reason: FinishReason | None, stop_id: int | None) -> None:
        now = self._clock()
        first = seq.first_token_at is None
        self.metrics.on_tokens(seq, len(gained), now)
        logprobs = tuple(draw.logprob for draw in gained if draw.logprob is not None)
        delta = TokenDelta(
            request_id=seq.id,
            token_ids=tuple(draw.token_id for draw in gained),
            logprobs=logprobs if seq.sampling.logprobs is not None else None,
            finish_reason=reason,
            stop_token_id=stop_id,
        )
        if first:
            delta = _with_prompt(delta, seq)
        self._outbox.append(delta)
        if reason is not None:
            self.metrics.on_end(seq)
            self.metrics.finished += 1
            self._remove(seq)

    def _end(self, seq: SequenceState, reason: FinishReason, *, error: Error | None = None) -> None:
        """End a sequence that gained nothing in this step."""
        delta = TokenDelta(request_id=seq.id, finish_reason=reason, error=error)
        self._outbox.append(_with_prompt(delta, seq) if seq.first_token_at is None else delta)
        self.metrics.failed += error is not None
        self._remove(seq)

    def _fail(self, seq: SequenceState, error: SageError) -> None:
        self._end(seq, "error", error=error.to_wire())

    def _fail_all(self, error: SageError) -> None:
        for seq in list(self._sequences.values()):
            self._fail(seq, error)

    def _remove(self, seq: SequenceState) -> None:
        del self._sequences[seq.id]
        if seq in self._compiling:
            self._compiling.remove(seq)
        if seq.phase is not Phase.FINISHED:
            self._scheduler.remove(seq)
        if self._speculator is not None:
            self._speculator.forget(seq)

    def _on_failure(self, works: list[Work], error: Exception) -> None:
        """Fail the sequences of the step; after several such steps in a row the engine is dead, and says so."""
        self._failures += 1
        self._kv.forget()  # what a failed step has written is not known
        if self._failures >= self.settings.max_failures or isinstance(error, EngineDiedError):
            last = error.message if isinstance(error, SageError) else _name(error)
            self.died = EngineDiedError(f"the device failed {self._failures} steps in a row, last: {last}")
            self._fail_all(self.died)
            return
        wire = error if isinstance(error, SageError) else InternalError(f"a step of the device failed: {_name(error)}")
        for work in works:
            self._fail(work.seq, wire)

    def _check_open(self) -> None:
        if self.died is not None:
            raise self.died
        if self.draining:
            raise UnavailableError("the engine is draining: it takes no more requests")
        if len(self._scheduler.waiting) >= self.settings.max_waiting:
            raise ResourceExhaustedError(
                f"{len(self._scheduler.waiting)} requests are waiting, the queue holds {self.settings.max_waiting}: "
                "try again later",
                retry_after_s=1.0,
            )

    def _copy_block(self, source: int, destination: int) -> None:
        self._runner.kv.copy_blocks([(source, destination)])
        if self._speculator is not None:
            self._speculator.copy_block(source, destination)


def _with_prompt(delta: TokenDelta, seq: SequenceState) -> TokenDelta:
    scores: tuple[TokenLogprob | None, ...] | None = None
    if seq.prompt_logprobs is not None:
        scores = tuple(seq.prompt_logprobs)
    return msgspec.structs.replace(
        delta, prompt_tokens=seq.n_prompt, cached_tokens=seq.cached_tokens, prompt_logprobs=scores
    )


def _wire_error(error: Exception) -> SageError:
    return error if isinstance(error, SageError) else InternalError(f"a step of the device failed: {_name(error)}")


def _name(error: Exception) -> str:
    return type(error).__name__
