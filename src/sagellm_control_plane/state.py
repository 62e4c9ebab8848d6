"""The control plane as a state machine without I/O: events in, commands out.

The live driver and the simulator run this same object. It has no clock and no random source of its own: `now` and the
generator come in, so that a log of events replays to identical commands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sagellm_control_plane import admission, migration
from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import (
    Abort,
    AttemptFailed,
    AttemptFinished,
    BlocksChanged,
    BlocksSnapshot,
    Command,
    EngineDied,
    EngineJoined,
    EngineLeft,
    EngineReported,
    EngineStateChanged,
    Event,
    Fail,
    FirstToken,
    HedgeDue,
    PolicyChanged,
    ProbeNow,
    RequestArrived,
    RequestCancelled,
    Tick,
    unavailable,
)
from sagellm_control_plane.fairness import TokenCounters
from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.ledger import Ledger
from sagellm_control_plane.placement import Placement
from sagellm_control_plane.records import Attempt, Record, Records
from sagellm_control_plane.stats import Stats
from sagellm_control_plane.view import ClusterView, RandomSource
from sagellm_control_plane.waiting import WaitingRoom
from sagellm_protocol.errors import ErrorCode

__all__ = ["ControlState"]


class ControlState:
    """Everything that the control plane knows, and what it does about each event.

    Events of engines go to the `Fleet`; those of requests are handled here, with `Placement` to place them, `WaitingRoom` for those that
    wait, and `Retries` to say what becomes of a failed attempt.
    """

    def __init__(self, config: CoreConfig, rng: RandomSource) -> None:
        self.config = config
        self.view = ClusterView(config.slo)
        self.ledger = Ledger()
        self.stats = Stats()
        self.admission = admission.Admission(config.admission)
        self.counters = TokenCounters(config.fairness)
        self.records = Records(self.view, self.counters, self.stats)
        self._placement = Placement(config, self.view, self.ledger, self.admission, self.counters, self.stats, rng)
        self._waiting = WaitingRoom(
            config, self.view, self.records, self._placement, self.admission, self.counters, self.stats
        )
        self._retries = migration.Retries(config.retry, self.stats)
        self._judges = config.admission.slo is not None
        self._hedges = migration.hedge_budget(config.hedge, self.stats)
        self._fleet = fleet = Fleet(config, self.view, self._waiting, self.stats)
        self._handlers: dict[type, Callable[[Any, float], list[Command]]] = {
            EngineJoined: fleet.on_joined,
            EngineStateChanged: fleet.on_state,
            EngineDied: fleet.on_died,
            EngineLeft: fleet.on_left,
            EngineReported: fleet.on_reported,
            BlocksChanged: fleet.on_blocks,
            BlocksSnapshot: fleet.on_snapshot,
            RequestArrived: self._on_arrived,
            FirstToken: self._on_first_token,
            AttemptFinished: self._on_finished,
            AttemptFailed: self._on_failed,
            RequestCancelled: self._on_cancelled,
            HedgeDue: self._on_hedge,
            PolicyChanged: self._on_policy,
            Tick: self._on_tick,
        }

    def on_event(self, event: Event, now: float) -> list[Command]:
        """Take in what happened at `now` (seconds on any steady clock) and return what is to be done, in order."""
        return self._handlers[type(event)](event, now)

    @property
    def scheduling_policy(self) -> str:
        """Name of the policy in force."""
        return self._placement.policy.name

    @property
    def routing_strategy(self) -> str:
        """Name of the strategy in force."""
        return self._placement.routing_strategy

    @property
    def active(self) -> int:
        """Sequences that have not ended."""
        return len(self.records)

    def waiting(self, model: str | None = None) -> int:
        """Sequences held centrally, for one model or all."""
        return self._waiting.count(model)

    def arrivals_of(self, model: str) -> tuple[int, int]:
        """Sequences of a model that arrived, and that ended, since the start."""
        return self.records.arrivals_of(model)

    def is_waiting(self, request_id: str) -> bool:
        """Whether the sequence is held centrally now."""
        record = self.records.find(request_id)
        return record is not None and record.queued_at is not None

    def emitted(self, request_id: str) -> int:
        """Tokens of a sequence that attempts before the present one produced."""
        return self.records[request_id].request.emitted

    def _on_arrived(self, event: RequestArrived, now: float) -> list[Command]:
        request = event.request
        record = self.records.arrived(request)
        if not self._waiting.count(request.model):
            if not self.view.ready.get(request.model):
                return self._no_engine(record, now)
            decision = self._placement.decide(request, now)
            if decision is not None:
                if self._judges or request.deadline_s is not None:
                    late = self.admission.judge(request, decision, now)
                    if late is not None:
                        return self._waiting.refuse(request, admission.refusal(request, late), "late")
                self.records.keep(record)
                return [self._placement.dispatch(record, decision, now)]
            return self._waiting.hold(record, now)
        return self._waiting.hold_if_room(record, now)

    def _no_engine(self, record: Record, now: float) -> list[Command]:
        model = record.request.model
        starting = any(e.model == model and e.state == "STARTING" for e in self.view.engines.values())
        if starting and self.config.admission.cold_wait_s > 0.0:
            return self._waiting.hold(record, now)
        self.stats.rejected += 1
        message = f"no engine of model {model!r} is ready{' yet, one is starting' if starting else ''}: try again"
        return [Fail(record.request.request_id, unavailable(message, retry_after_s=1.0))]

    def _on_hedge(self, event: HedgeDue, now: float) -> list[Command]:
        record = self.records.find(event.request_id)
        if record is None or len(record.attempts) != 1 or record.first_at is not None:
            return []
        busy = tuple(a.lease.engine.engine_id for a in record.attempts.values())
        request = record.request
        candidates = self._placement.second(request, busy, now)
        if not candidates or not self._hedges.take(now):
            return []
        self.stats.hedges += 1
        decision = self._placement.route(request, candidates, now)
        return [self._placement.dispatch(record, decision, now, hedge=True)]

    def _on_first_token(self, event: FirstToken, now: float) -> list[Command]:
        record = self.records.find(event.request_id)
        attempt = record.attempts.get(event.attempt) if record is not None else None
        if record is None or attempt is None or attempt.first_at is not None:
            return []
        attempt.first_at = now
        lease, engine = attempt.lease, attempt.lease.engine
        seconds = now - attempt.at
        prefilled_by = attempt.prefill.engine if attempt.prefill is not None else engine
        prefilled_by.latency.learn_ttft(attempt.ahead_tokens, attempt.decoding, seconds)
        if attempt.prefill is not None:
            prefilled_by.busy_since = now
            attempt.return_prefill(self.ledger)
        self.stats.on_ttft(now - record.request.arrived_at, attempt.predicted, seconds, first=record.first_at is None)
        self.ledger.first_token(lease, now)
        attempt.sequences = engine.running
        attempt.context = engine.context_tokens
        engine.breaker.on_success()
        record.suspicion = 0.0
        if record.first_at is None:
            record.first_at = now
        return [self._close(record, number) for number in list(record.attempts) if number != event.attempt]

    def _close(self, record: Record, number: int) -> Abort:
        """Give up one attempt of a sequence that goes on elsewhere or ends."""
        attempt = record.attempts.pop(number)
        attempt.return_leases(self.ledger)
        attempt.lease.engine.breaker.on_neutral()
        return Abort(record.request.request_id, number, attempt.lease.engine.engine_id)

    def _on_finished(self, event: AttemptFinished, now: float) -> list[Command]:
        record = self.records.find(event.request_id)
        attempt = record.attempts.pop(event.attempt, None) if record is not None else None
        if record is None or attempt is None:
            return []
        engine = attempt.lease.engine
        self._learn_pace(attempt, event.output_tokens - record.request.emitted, now)
        engine.completed += 1
        engine.breaker.on_success()
        attempt.return_leases(self.ledger)
        commands: list[Command] = [self._close(record, number) for number in list(record.attempts)]
        self.records.end(record, event.output_tokens)
        self.stats.completed += 1
        return commands + self._waiting.pump(engine.model, now)

    def _learn_pace(self, attempt: Attempt, tokens: int, now: float) -> None:
        if attempt.first_at is None or tokens < 2:
            return
        engine = attempt.lease.engine
        seconds = (now - attempt.first_at) / (tokens - 1)
        self.stats.on_tpot(seconds)
        # The load changed while it decoded: the mean of both ends is what the request saw.
        sequences = (attempt.sequences + engine.running) / 2
        engine.latency.learn_tpot(sequences, (attempt.context + engine.context_tokens) / 2, seconds)

    def _on_failed(self, event: AttemptFailed, now: float) -> list[Command]:
        record = self.records.find(event.request_id)
        attempt = record.attempts.pop(event.attempt, None) if record is not None else None
        if record is None or attempt is None:
            return []
        engine = attempt.lease.engine
        died = event.error.code is ErrorCode.ENGINE_DIED
        if died:
            share = migration.blame(engine, now, progressed=attempt.first_at is not None, suspect=attempt.lease.suspect)
            record.suspicion += share
        attempt.return_leases(self.ledger)
        commands: list[Command] = []
        if event.error.retryable:
            engine.failed += 1
            engine.breaker.on_failure(now)
        if died and engine.state == "READY":
            # It may be a broken connection or a dead engine: nothing more is sent until a probe has answered.
            self.view.set_state(engine.engine_id, "ERROR")
            commands.append(ProbeNow(engine.engine_id))
        if record.attempts:
            return commands  # a hedge is still running
        request = record.request
        request.emitted = max(request.emitted, event.emitted)
        request.journal = engine.profile.journal
        record.last_error = event.error
        final = self._retries.verdict(record, event.error, now)
        if final is not None:
            self.records.end(record, request.emitted)
            self.stats.failed += 1
            return [*commands, Fail(request.request_id, final), *self._waiting.pump(engine.model, now)]
        request.avoid = (engine.engine_id,)
        request.suspect = record.suspicion > 0.0
        decision = self._placement.decide(request, now) if self.view.ready.get(request.model) else None
        if decision is None:
            return commands + self._waiting.hold(record, now) + self._waiting.pump(engine.model, now)
        commands.append(self._placement.dispatch(record, decision, now))
        return commands + self._waiting.pump(engine.model, now)

    def _on_cancelled(self, event: RequestCancelled, now: float) -> list[Command]:
        record = self.records.find(event.request_id)
        if record is None:
            return []
        commands: list[Command] = [self._close(record, number) for number in list(record.attempts)]
        self._waiting.leave(record)
        self.records.end(record, max(event.output_tokens, record.request.emitted))
        if event.finished:
            self.stats.completed += 1
        else:
            self.stats.cancelled += 1
        return commands + self._waiting.pump(record.request.model, now)

    def _on_policy(self, event: PolicyChanged, _now: float) -> list[Command]:
        if self._placement.use(event.scheduling_policy, event.routing_strategy):
            self._waiting.reorder()
        return []

    def _on_tick(self, _event: Tick, now: float) -> list[Command]:
        self._fleet.on_tick(now)
        return self._waiting.tick(now)
