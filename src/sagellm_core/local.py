"""An engine in this process: the step loop on its own thread, callers on any number of event loops.

Commands go in through one inbox; deltas go out with one wake-up of each event loop a step, however many streams it has, or in one
call of an `Outlet`, which needs none. A consumer that is slow gets its deltas joined, so what is kept for it is bounded by its tokens.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from sagellm_core.engine import Engine
from sagellm_core.handover import Handover
from sagellm_protocol.deltas import join_deltas
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import EngineDiedError, ErrorCode, SageError, UnavailableError
from sagellm_protocol.handover import KVExportRequest, KVImported, KVTicket
from sagellm_protocol.prefix import BlockEvent, BlockSnapshot

__all__ = ["LocalEngine", "Outlet"]

_T = TypeVar("_T")

_EXIT_S = 10.0
"""How long the end of the interpreter waits for a step."""
_IDLE_POLL_S = 0.002
"""How long to wait for a grammar that is being compiled while nothing else runs."""


class Outlet(Protocol):
    """Takes the tokens of sequences on the engine's thread, before the next step begins: it must be quick and never block.

    `key` is what a sequence was submitted with.
    """

    def gained(self, deltas: list[tuple[Any, TokenDelta]]) -> bool:
        """What sequences gained in one step, each with its key; False if nobody is left to read, which aborts them."""
        ...

    def ended(self, key: Any, error: SageError) -> None:
        """The engine ended under a sequence. Also called on the thread that submits."""
        ...


@dataclass(frozen=True, slots=True)
class _LoopOutlet:
    """The readers of one event loop: it is woken once for all that a step gave them."""

    loop: asyncio.AbstractEventLoop

    def gained(self, deltas: list[tuple[_Stream, TokenDelta]]) -> bool:
        return _on_loop(self.loop, _push_all, deltas)

    def ended(self, key: _Stream, error: SageError) -> None:
        _on_loop(self.loop, key.fail, error)


class _Stream:
    """The consumer's end of one sequence; touched on its event loop only."""

    def __init__(self) -> None:
        self._deltas: list[TokenDelta] = []
        self._error: SageError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> None:
        self._deltas.append(delta)
        self._wake()

    def fail(self, error: SageError) -> None:
        self._error = error
        self._wake()

    async def next(self) -> TokenDelta:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delta = join_deltas(self._deltas)
        self._deltas.clear()
        return delta

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence and where its deltas go."""

    request: EngineRequest
    outlet: Outlet
    key: Any


@dataclass(slots=True)
class _Command:
    """Something to run on the engine's thread between two steps."""

    run: Callable[[], None]
    refuse: Callable[[SageError], object]


class LocalEngine:
    """`EngineClient` over an `Engine` that this object owns from now on.

    May be used from several threads and event loops at once. `close` joins the thread; the end of the interpreter does, too.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._description = engine.describe()
        self._inbox: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._ended: SageError | None = None
        self._sequences: dict[str, _Sequence] = {}
        self._handover = Handover(engine, self._call)
        self._thread = threading.Thread(target=self._main, name=f"engine-{self._description.engine_id}", daemon=True)
        _close_at_exit(self)
        self._thread.start()

    # ----------------------------------------------------------- EngineClient

    @property
    def engine_id(self) -> str:
        """The engine's name."""
        return self._description.engine_id

    async def describe(self) -> EngineDescription:
        """Return what the engine serves."""
        return self._description

    async def status(self) -> EngineStatus:
        """Return what the engine is doing; answers also while a step hangs.

        Raises:
            EngineDiedError: the engine is dead.
        """
        return self.snapshot()

    def snapshot(self) -> EngineStatus:
        """Like `status`, without an event loop.

        Raises:
            EngineDiedError: the engine is dead.
            UnavailableError: it was closed.
        """
        ended = self._ended or self._engine.died
        if ended is not None:
            raise ended
        return self._engine.status()

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one sequence; closing the generator aborts it and frees its blocks within a step.

        Raises:
            EngineDiedError: the engine ended.
            UnavailableError: it was closed.
        """
        stream = _Stream()
        leave = self.submit(request, _LoopOutlet(asyncio.get_running_loop()), stream)
        finished = False
        try:
            while not finished:
                delta = await stream.next()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            if not finished and self._ended is None:
                leave()

    def submit(self, request: EngineRequest, outlet: Outlet, key: Any) -> Callable[[], None]:
        """Run one sequence, whose deltas go to `outlet`; return what aborts it and frees its blocks within a step. From any thread.

        What was under way when it was aborted may still come.
        """
        sequence = _Sequence(request, outlet, key)
        self._post(_Command(lambda: self._start(sequence), partial(outlet.ended, key)))
        return lambda: self._post(_Command(lambda: self._leave(sequence), _ignore))

    async def abort(self, request_id: str) -> bool:
        """Abort a sequence by id; its stream ends with ``cancelled``. False if the engine does not hold it."""
        return await self._call(lambda: self._engine.abort(request_id))

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Compute one vector for each input (`EmbeddingClient`); cancelling the task drops what is not computed yet.

        Raises:
            UnsupportedError: the model cannot do this task.
            ContextLengthError: an input does not fit.
            DeadlineExceededError: the request's own deadline passed.
            EngineDiedError: the engine ended.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EmbedResult] = loop.create_future()

        def done(outcome: EmbedResult | SageError) -> None:
            setter = _set_exception if isinstance(outcome, SageError) else _set_result
            _on_loop(loop, setter, future, outcome)

        def start() -> None:
            try:
                self._engine.embed(request, done)
            except SageError as error:
                done(error)

        self._post(_Command(start, done))
        try:
            return await future
        except asyncio.CancelledError:
            self._post(_Command(lambda: _drop(self._engine, request.request_id), _ignore))
            raise

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter (a PEFT directory) and make it usable as `name`.

        Raises:
            ModelFileError: missing, malformed, or for another model.
            InvalidArgumentError: the name is taken.
            UnsupportedError: the backend takes no adapters.
            ResourceExhaustedError: the cap for adapters would be passed.
        """
        from sagellm_core.loader.adapter import open_adapter

        loop = asyncio.get_running_loop()
        adapter = await loop.run_in_executor(None, open_adapter, path, name, self._engine.spec)
        await self._call(lambda: self._engine.load_adapter(adapter))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            InvalidArgumentError: it is not loaded, or sequences use it.
        """
        await self._call(lambda: self._engine.unload_adapter(name))

    async def block_events(self, after: int) -> list[BlockEvent]:
        """Return the changes of the prefix cache numbered above `after`."""
        return await self._call(lambda: self._engine.block_events(after))

    async def block_snapshot(self) -> BlockSnapshot:
        """Return all that the prefix cache holds."""
        return await self._call(self._engine.block_snapshot)

    async def export_kv(self, request: KVExportRequest) -> KVTicket:
        """Write the cached blocks of a prompt's beginning to shared memory (see `sagellm_core.handover`).

        Raises:
            KVTransferError: nothing of it is cached, or shared memory is full.
        """
        return await self._handover.export(request)

    async def import_kv(self, ticket: KVTicket) -> KVImported:
        """Take exported blocks into the prefix cache.

        Raises:
            KVTransferError: they are another model's, incomplete or damaged.
        """
        return await self._handover.import_(ticket)

    async def discard_kv(self, name: str) -> bool:
        """Remove exported blocks that nobody will import; False if they are gone."""
        return self._handover.discard(name)

    async def drain(self) -> None:
        """Take no more sequences; those that are here go on to their end."""
        await self._call(self._engine.drain)

    async def clear_cache(self) -> int:
        """Drop all cached blocks that nobody holds; return how many."""
        return await self._call(self._engine.clear_cache)

    async def check_integrity(self) -> None:
        """Check that every block and every sequence is accounted for.

        Raises:
            AssertionError: an invariant is broken; the message names it.
        """
        await self._call(self._engine.check_integrity)

    async def close(self) -> None:
        """End the thread and close the engine; streams that are open end with an error. Idempotent."""
        await asyncio.get_running_loop().run_in_executor(None, self.close_sync)

    def close_sync(self, timeout_s: float | None = None) -> None:
        """Like `close`, without an event loop; waits at most `timeout_s` seconds for the step that is running."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        _open.discard(self)
        self._handover.close()

    # ------------------------------------------------------ any thread -> engine

    def _post(self, command: _Command) -> None:
        with self._wake:
            ended = self._ended
            if ended is None:
                self._inbox.append(command)
                self._wake.notify()
        if ended is not None:
            command.refuse(ended)

    async def _call(self, function: Callable[[], _T]) -> _T:
        """Run `function` on the engine's thread between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def run() -> None:
            try:
                result = function()
            except (SageError, AssertionError) as error:
                _on_loop(loop, _set_exception, future, error)
            else:
                _on_loop(loop, _set_result, future, result)

        self._post(_Command(run, lambda error: _on_loop(loop, _set_exception, future, error)))
        return await future

    # --------------------------------------------------------- engine's thread

    def _main(self) -> None:
        try:
            while self._next_commands():
                self._deliver(self._engine.step())
                if self._engine.died is not None:
                    break
        finally:
            self._finish()

    def _next_commands(self) -> bool:
        """Run what came in, waiting for it when there is nothing else to do; False when it is time to end."""
        with self._wake:
            while not (self._closing or self._inbox or self._engine.has_work):
                self._wake.wait()
            if not self._inbox and self._engine.stalled:
                self._wake.wait(_IDLE_POLL_S)
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command.run()
        return not self._closing

    def _start(self, sequence: _Sequence) -> None:
        request_id = sequence.request.request_id
        try:
            self._engine.add(sequence.request)
        except SageError as error:
            delta = TokenDelta(request_id=request_id, finish_reason="error", error=error.to_wire())
            sequence.outlet.gained([(sequence.key, delta)])
        else:
            self._sequences[request_id] = sequence

    def _leave(self, sequence: _Sequence) -> None:
        request_id = sequence.request.request_id
        if self._sequences.get(request_id) is sequence:
            del self._sequences[request_id]
            self._engine.abort(request_id, silently=True)  # the id may come again before the next step

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        """Hand deltas out: each outlet gets all that is its own in one call."""
        by_outlet: dict[Outlet, list[tuple[Any, TokenDelta]]] = {}
        for delta in deltas:
            sequence = self._sequences.get(delta.request_id)
            if sequence is None:
                continue
            if delta.error is not None and delta.error.code is ErrorCode.ENGINE_DIED:
                # The sequence may go on elsewhere: not its own failure.
                del self._sequences[delta.request_id]
                sequence.outlet.ended(sequence.key, SageError.from_wire(delta.error))
            else:
                by_outlet.setdefault(sequence.outlet, []).append((sequence.key, delta))
        for outlet, batch in by_outlet.items():
            read = outlet.gained(batch)
            for _, delta in batch:
                if not read:
                    self._leave(self._sequences[delta.request_id])
                elif delta.finish_reason is not None:
                    del self._sequences[delta.request_id]

    def _finish(self) -> None:
        """Tell everybody who waits that the engine has ended, then give the device back."""
        error = self._engine.died
        if error is None:
            error = (
                UnavailableError("the engine was closed")
                if self._closing
                else EngineDiedError("the engine's loop ended")
            )
        with self._wake:
            self._ended = error
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command.refuse(error)
        for sequence in self._sequences.values():
            sequence.outlet.ended(sequence.key, error)
        self._sequences.clear()
        self._engine.close()


_open: weakref.WeakSet[LocalEngine] = weakref.WeakSet()


def _close_at_exit(engine: LocalEngine) -> None:
    """A thread that is inside a device when the interpreter goes away takes the process down with it: end it before."""
    if not _open:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _open.add(engine)


def _close_all() -> None:
    for engine in list(_open):
        engine.close_sync(_EXIT_S)


def _push_all(batch: list[tuple[_Stream, TokenDelta]]) -> None:
    for stream, delta in batch:
        stream.push(delta)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> bool:
    """Run `function` on `loop`; False if that loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True


def _set_result(future: asyncio.Future[_T], result: _T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[_T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _drop(engine: Engine, request_id: str) -> None:
    engine.abort_embed(request_id)


def _ignore(error: SageError) -> None:
    """The engine has ended, and everything in it."""
