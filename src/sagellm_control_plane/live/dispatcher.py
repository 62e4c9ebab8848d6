"""The live driver: feeds the core with what happens, and carries its commands out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from sagellm_control_plane.decision_log import DecisionLog
from sagellm_control_plane.events import (
    Abort,
    Command,
    Dispatch,
    EngineDied,
    EngineJoined,
    EngineLeft,
    EngineStateChanged,
    Event,
    Fail,
    HedgeDue,
    ProbeNow,
    RequestArrived,
    RequestCancelled,
    RestartHung,
    SnapshotWanted,
)
from sagellm_control_plane.live.embedding import EmbeddingJob
from sagellm_control_plane.live.registry import Engine, EngineRegistry
from sagellm_control_plane.live.sequence import Mailbox, Sequence
from sagellm_control_plane.live.split import SplitStats
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.stats import Histogram
from sagellm_control_plane.types import EngineState
from sagellm_control_plane.view import RequestView
from sagellm_protocol.embedding import EmbedRequest
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import EngineDiedError, Error, UnavailableError
from sagellm_protocol.ports import EngineClient
from sagellm_protocol.prefix import BYTES_PER_TOKEN, block_hashes, text_hashes

__all__ = ["Dispatcher"]

_log = logging.getLogger(__name__)


class Dispatcher:
    """Owns the core, the engines' clients and the running sequences. One event loop, no locks."""

    def __init__(
        self, state: ControlState, *, log: DecisionLog | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.state = state
        self.registry = EngineRegistry()
        self.clock = clock
        self.split_stats = SplitStats()
        self.added = Histogram()
        self.decision_seconds = 0.0
        self.decision_events = 0
        self.on_probe: Callable[[str], None] = lambda _engine_id: None
        self.on_hung: Callable[[str], None] = lambda _engine_id: None
        self.on_snapshot_wanted: Callable[[str], None] = lambda _engine_id: None
        self._log = log
        self._sequences: dict[str, Sequence | EmbeddingJob] = {}
        self._idle_waiters: dict[str, list[asyncio.Event]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._feeding = False
        self._pending: list[Event] = []

    # -- events in, commands out -----------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Tell the core what happened and do what it says. Events that this causes are fed after it, in order."""
        self._pending.append(event)
        self._settle()

    def feed_after(self, act: Callable[[], None], events: Iterable[Event]) -> None:
        """Do `act`, and only then tell the core `events` and what `act` led to.

        A client that waits for a token gets it before the books are kept.
        """
        self._pending.extend(events)
        feeding, self._feeding = self._feeding, True
        try:
            act()
        finally:
            self._feeding = feeding
            self._settle()

    def _settle(self) -> None:
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._pending:
                self._feed_one(self._pending.pop(0))
        finally:
            self._feeding = False

    def _feed_one(self, event: Event) -> None:
        now = self.clock()
        commands = self.state.on_event(event, now)
        self.decision_seconds += self.clock() - now
        self.decision_events += 1
        if self._log is not None:
            self._log.append(now, event, commands)
        for command in commands:
            self._carry_out(command)
        if self._idle_waiters:
            self._wake_idle_waiters()

    def _carry_out(self, command: Command) -> None:
        match command:
            case Dispatch():
                self._start(command)
            case Fail(request_id=request_id, error=error):
                sequence = self._sequences.get(request_id)
                if sequence is not None:
                    sequence.fail(error)
            case Abort(request_id=request_id, attempt=number):
                sequence = self._sequences.get(request_id)
                if sequence is not None:
                    sequence.abort(number)
            case ProbeNow(engine_id=engine_id):
                self.engine_failed_request(engine_id)
            case RestartHung(engine_id=engine_id, idle_s=idle):
                self._restart_hung(engine_id, idle)
            case SnapshotWanted(engine_id=engine_id):
                self.on_snapshot_wanted(engine_id)

    def _start(self, command: Dispatch) -> None:
        sequence = self._sequences.get(command.request_id)
        if sequence is None:  # closed again before its arrival was taken in: the next event takes the attempt back
            return
        engine = self.registry.get(command.engine_id)
        engine.info.total_requests += 1
        assert engine.client is not None, "the core dispatches to ready engines only, and those have a client"
        if command.hedge_after_s is not None:
            self._timers[command.request_id] = asyncio.get_running_loop().call_later(
                command.hedge_after_s, self._hedge_due, command.request_id
            )
        prefill = self.registry.find(command.prefill_engine_id) if command.prefill_engine_id else None
        if prefill is not None and prefill.client is not None and isinstance(sequence, Sequence):
            prefill.info.total_requests += 1
            sequence.start(command.attempt, command.engine_id, engine.client, prefill.client)
        else:
            sequence.start(command.attempt, command.engine_id, engine.client)

    def _hedge_due(self, request_id: str) -> None:
        self._timers.pop(request_id, None)
        self.feed(HedgeDue(request_id))

    # -- sequences -------------------------------------------------------------------------------------------------

    def open(self, index: int, request: EngineRequest, view: RequestView, mailbox: Mailbox) -> Sequence:
        """Begin a sequence: its deltas, or one error, arrive in `mailbox`."""
        sequence = Sequence(index, request, mailbox, self, self.clock, self.split_stats)
        self._sequences[request.request_id] = sequence
        self.feed(RequestArrived(view))
        return sequence

    def open_embedding(self, request: EmbedRequest, view: RequestView) -> EmbeddingJob:
        """Begin an embedding: its future gets the result."""
        job = EmbeddingJob(request, self.feed)
        self._sequences[request.request_id] = job
        self.feed(RequestArrived(view))
        return job

    def close(self, sequence: Sequence | EmbeddingJob, *, finished: bool = False) -> None:
        """End a sequence, wherever it stands; aborts what still runs. Idempotent."""
        timer = self._timers.pop(sequence.request_id, None)
        if timer is not None:
            timer.cancel()
        if self._sequences.get(sequence.request_id) is not sequence:
            return
        if not sequence.finished:
            self.feed(RequestCancelled(sequence.request_id, sequence.emitted, finished))
        sequence.stop()  # the core's own word may come later
        del self._sequences[sequence.request_id]
        sequence.ended = True

    def holds(self, request_id: str) -> bool:
        """Whether a sequence of that id is open."""
        return request_id in self._sequences

    def blocks_of(self, request: EngineRequest, model: str, text: bytes | None) -> tuple[tuple[bytes, ...], int]:
        """Return the names of the prompt's blocks and their size in tokens; nothing where there is nothing to choose.

        `text` is the prompt where its token ids are not known.
        """
        ready = self.state.view.ready.get(model, ())
        if len(ready) < 2:
            return (), 0
        size = ready[0].profile.block_size
        if len(request.prompt_token_ids) < size:
            return (), size
        adapter, salt = request.adapter, request.cache_salt
        if text is not None:
            names = text_hashes(text, block_bytes=size * BYTES_PER_TOKEN, adapter=adapter, salt=salt)
        else:
            names = block_hashes(request.prompt_token_ids, block_size=size, adapter=adapter, salt=salt)
        return tuple(names), size

    # -- engines ---------------------------------------------------------------------------------------------------

    def engine_ready(self, engine: Engine, client: EngineClient, *, fresh: bool) -> None:
        """The engine answers: tell the core, which may send what waits. `fresh` when its caches are empty."""
        engine.client = client
        engine.missed_probes = 0
        engine.hung = False
        if not engine.joined:
            engine.joined = True
            self.feed(EngineJoined(engine.profile()))
        self.set_state(engine, EngineState.READY, fresh=fresh)

    def set_state(self, engine: Engine, state: EngineState, *, fresh: bool = False) -> None:
        """Change an engine's state, here and in the core."""
        engine.info.state = state
        if engine.joined:
            self.feed(EngineStateChanged(engine.info.engine_id, state.value, fresh))

    def engine_died(self, engine_id: str, reason: str, *, restarting: bool = False) -> None:
        """The engine ended or cannot be reached: every attempt on it fails, and most go on elsewhere."""
        engine = self.registry.find(engine_id)
        if engine is None:
            return
        engine.info.state = EngineState.STARTING if restarting else EngineState.ERROR
        engine.info.consecutive_failures += 1
        engine.info.last_error = reason
        if engine.joined:
            self.feed(EngineDied(engine_id, restarting))
        self.fail_attempts(engine_id, EngineDiedError(f"engine {engine_id} ended: {reason}").to_wire())

    def engine_failed_request(self, engine_id: str) -> None:
        """A request says that the engine died: give it nothing until a probe has answered."""
        engine = self.registry.find(engine_id)
        if engine is None or engine.info.state is not EngineState.READY:
            return
        engine.info.state = EngineState.ERROR
        self.on_probe(engine_id)

    def fail_attempts(self, engine_id: str, error: Error) -> None:
        """Fail every attempt on an engine."""
        for sequence in list(self._sequences.values()):
            for number in sequence.attempts_on(engine_id):
                sequence.fail_attempt(number, error)

    def fail_stalled(self, now: float, limit_s: float) -> int:
        """Fail attempts that produced tokens and then none for `limit_s`; return how many."""
        count = 0
        for sequence in list(self._sequences.values()):
            for number in sequence.stalled(now, limit_s):
                error = UnavailableError(f"no token came for {limit_s:.0f} s").to_wire()
                sequence.fail_attempt(number, error)
                count += 1
        return count

    def forget(self, engine_id: str) -> Engine:
        """Unregister an engine; attempts on it go on elsewhere."""
        engine = self.registry.remove(engine_id)
        engine.info.state = EngineState.STOPPED
        if engine.joined:
            self.feed(EngineLeft(engine_id))
        self.fail_attempts(engine_id, UnavailableError(f"engine {engine_id} was unregistered").to_wire())
        return engine

    async def wait_idle(self, engine_id: str, timeout_s: float) -> bool:
        """Wait until no attempt runs on the engine; False when the time is over first."""
        if self._running_on(engine_id) == 0:
            return True
        event = asyncio.Event()
        self._idle_waiters.setdefault(engine_id, []).append(event)
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        finally:
            waiters = self._idle_waiters.get(engine_id, [])
            if event in waiters:
                waiters.remove(event)
            if not waiters:
                self._idle_waiters.pop(engine_id, None)
        return True

    def _running_on(self, engine_id: str) -> int:
        view = self.state.view.engines.get(engine_id)
        return view.running if view is not None else 0

    def _wake_idle_waiters(self) -> None:
        for engine_id, events in list(self._idle_waiters.items()):
            if self._running_on(engine_id) == 0:
                for event in events:
                    event.set()

    def _restart_hung(self, engine_id: str, idle_s: float) -> None:
        _log.warning("engine %s has work and made no step for %.1f s: it is taken out", engine_id, idle_s)
        self.registry.get(engine_id).hung = True
        self.engine_died(engine_id, f"no step for {idle_s:.1f} s")
        self.on_hung(engine_id)
