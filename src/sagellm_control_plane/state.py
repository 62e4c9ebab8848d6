"""The control plane as a state machine without I/O: events in, commands out.

The live driver and the simulator run this same object. It has no clock and no random source of its own: `now` and the
generator come in, so that a log of events replays to identical commands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sagellm_control_plane import admission, migration, pairing
from sagellm_control_plane.breaker import Breaker
from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import (
    Abort,
    AttemptFailed,
    AttemptFinished,
    BlocksChanged,
    BlocksSnapshot,
    Command,
    Dispatch,
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
    RestartHung,
    SnapshotWanted,
    Tick,
    unavailable,
)
from sagellm_control_plane.fairness import TokenCounters, WaitingQueue
from sagellm_control_plane.ledger import Lease, Ledger
from sagellm_control_plane.policies import policy_named
from sagellm_control_plane.routing import route_named
from sagellm_control_plane.stats import Stats
from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView
from sagellm_protocol.errors import Error, ErrorCode

__all__ = ["ControlState"]


class _Attempt:
    """One dispatch of a sequence to an engine."""

    __slots__ = (
        "ahead_tokens",
        "at",
        "context",
        "decoding",
        "first_at",
        "hedge",
        "lease",
        "predicted",
        "prefill",
        "sequences",
    )

    def __init__(
        self, lease: Lease, prefill: Lease | None, at: float, predicted: float, ahead_tokens: float, *, hedge: bool
    ) -> None:
        self.lease = lease
        self.prefill = prefill
        self.at = at
        self.predicted = predicted
        self.ahead_tokens = ahead_tokens
        self.decoding = (prefill or lease).engine.decoding
        self.first_at: float | None = None
        self.hedge = hedge
        self.sequences = 0
        self.context = 0


class _Record:
    """One sequence from arrival to its end."""

    __slots__ = ("attempts", "first_at", "last_error", "queued_at", "request", "suspicion", "tries")

    def __init__(self, request: RequestView) -> None:
        self.request = request
        self.attempts: dict[int, _Attempt] = {}
        self.tries = 0
        self.suspicion = 0.0
        self.first_at: float | None = None
        self.queued_at: float | None = None
        self.last_error: Error | None = None


class ControlState:
    """Everything that the control plane knows, and what it does about each event."""

    def __init__(self, config: CoreConfig, rng: RandomSource) -> None:
        self.config = config
        self.view = ClusterView(config.slo)
        self.ledger = Ledger()
        self.stats = Stats()
        self.admission = admission.Admission(config.admission)
        self.counters = TokenCounters(config.fairness)
        self._rng = rng
        self._policy = policy_named(config.scheduling_policy)
        self._route = route_named(config.routing_strategy)
        self.routing_strategy = config.routing_strategy
        self._records: dict[str, _Record] = {}
        self._arrived: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._queues: dict[str, WaitingQueue] = {}
        self._retries = migration.retry_budget(config.retry)
        self._hedges = migration.hedge_budget(config.hedge)
        self._handlers: dict[type, Callable[[Any, float], list[Command]]] = {
            EngineJoined: self._on_joined,
            EngineStateChanged: self._on_state,
            EngineDied: self._on_died,
            EngineLeft: self._on_left,
            EngineReported: self._on_reported,
            RequestArrived: self._on_arrived,
            FirstToken: self._on_first_token,
            AttemptFinished: self._on_finished,
            AttemptFailed: self._on_failed,
            RequestCancelled: self._on_cancelled,
            HedgeDue: self._on_hedge,
            BlocksChanged: self._on_blocks,
            BlocksSnapshot: self._on_snapshot,
            PolicyChanged: self._on_policy,
            Tick: self._on_tick,
        }

    def on_event(self, event: Event, now: float) -> list[Command]:
        """Take in what happened at `now` (seconds on any steady clock) and return what is to be done, in order."""
        return self._handlers[type(event)](event, now)

    @property
    def scheduling_policy(self) -> str:
        """Name of the policy in force."""
        return self._policy.name

    @property
    def active(self) -> int:
        """Sequences that have not ended."""
        return len(self._records)

    def waiting(self, model: str | None = None) -> int:
        """Sequences held centrally, for one model or all."""
        if model is not None:
            queue = self._queues.get(model)
            return len(queue) if queue is not None else 0
        return sum(len(queue) for queue in self._queues.values())

    def arrivals_of(self, model: str) -> tuple[int, int]:
        """Sequences of a model that arrived, and that ended, since the start."""
        return self._arrived.get(model, 0), self._ended.get(model, 0)

    def is_waiting(self, request_id: str) -> bool:
        """Whether the sequence is held centrally now."""
        record = self._records.get(request_id)
        return record is not None and record.queued_at is not None

    def emitted(self, request_id: str) -> int:
        """Tokens of a sequence that attempts before the present one produced."""
        return self._records[request_id].request.emitted

    # -- engines ---------------------------------------------------------------------------------------------------

    def _on_joined(self, event: EngineJoined, _now: float) -> list[Command]:
        profile = event.engine
        slots = profile.slots or self.config.default_slots
        overcommit = self.config.admission.overcommit
        limit = slots + (max(2, int(slots * overcommit)) if overcommit > 0.0 else 0)
        engine = EngineView(profile, self.config.prior, Breaker(self.config.breaker), limit)
        self.view.add(engine)
        self.view.prefix.set_capacity(engine.engine_id, profile.n_blocks or 4096)
        return []

    def _on_state(self, event: EngineStateChanged, now: float) -> list[Command]:
        engine = self.view.engines.get(event.engine_id)
        if engine is None:
            return []
        self.view.set_state(event.engine_id, event.state)
        if event.state != "READY":
            return self._strand(engine.model, now)
        engine.stepped_at = now
        engine.reported_steps = -1
        if event.fresh:
            engine.breaker.reset()
            self.view.prefix.clear_engine(event.engine_id)
        return self._pump(engine.model, now)

    def _on_died(self, event: EngineDied, now: float) -> list[Command]:
        engine = self.view.engines.get(event.engine_id)
        if engine is None:
            return []
        migration.note_death(engine, now)
        self.view.set_state(event.engine_id, "STARTING" if event.restarting else "ERROR")
        self.view.prefix.clear_engine(event.engine_id)
        return self._strand(engine.model, now)

    def _on_left(self, event: EngineLeft, now: float) -> list[Command]:
        engine = self.view.remove(event.engine_id)
        return self._strand(engine.model, now)

    def _on_reported(self, event: EngineReported, now: float) -> list[Command]:
        status = event.status
        engine = self.view.engines.get(status.engine_id)
        if engine is None:
            return []
        engine.reported_at = now
        engine.reported_running = status.running
        engine.reported_waiting = status.waiting
        engine.blocks_used = status.blocks_used
        engine.blocks_cached = status.blocks_cached
        engine.adapters = status.adapters
        idle_or_loading = status.running + status.waiting == 0 or status.phase != "ready"
        if status.steps != engine.reported_steps or idle_or_loading:
            engine.reported_steps = status.steps
            engine.stepped_at = now
            return []
        idle = now - engine.stepped_at
        if idle < self.config.health.hung_s or engine.state not in ("READY", "DRAINING"):
            return []
        self.stats.hung += 1
        engine.stepped_at = now
        self.view.set_state(engine.engine_id, "ERROR")
        return [RestartHung(engine.engine_id, idle)]

    def _on_blocks(self, event: BlocksChanged, _now: float) -> list[Command]:
        if event.engine_id not in self.view.engines:
            return []
        if self.view.prefix.apply(event.engine_id, event.sequence, event.stored, event.removed, cleared=event.cleared):
            return []
        return [SnapshotWanted(event.engine_id)]

    def _on_snapshot(self, event: BlocksSnapshot, _now: float) -> list[Command]:
        if event.engine_id in self.view.engines:
            self.view.prefix.snapshot(event.engine_id, event.sequence, event.blocks)
        return []

    # -- requests --------------------------------------------------------------------------------------------------

    def _on_arrived(self, event: RequestArrived, now: float) -> list[Command]:
        request = event.request
        self.stats.arrived += 1
        self._arrived[request.model] = self._arrived.get(request.model, 0) + 1
        self._retries.on_arrival()
        self._hedges.on_arrival()
        record = _Record(request)
        queue = self._queues.get(request.model)
        if not queue:
            if not self.view.ready.get(request.model):
                return self._no_engine(record, now)
            decision = self._decide(request, now)
            if decision is not None:
                late = self.admission.judge(request, decision, now)
                if late is not None:
                    return self._refuse(request, admission.refusal(request, late))
                self._records[request.request_id] = record
                return [self._dispatch(record, decision, now)]
            return self._hold(record, now)
        return self._hold_if_room(record, queue, now)

    def _hold_if_room(self, record: _Record, queue: WaitingQueue, now: float) -> list[Command]:
        """Queue the newcomer; when the queue is full, refuse it, or somebody less urgent in its favour."""
        request = record.request
        if len(queue) < self.config.admission.max_waiting:
            return self._hold(record, now)
        error = admission.overflow(len(queue))
        worst = queue.worst()
        if worst is None or worst.priority <= request.priority:
            return self._refuse(request, error)
        queue.remove(worst.request_id)
        del self._records[worst.request_id]
        return self._refuse(worst, error) + self._hold(record, now)

    def _no_engine(self, record: _Record, now: float) -> list[Command]:
        model = record.request.model
        starting = any(e.model == model and e.state == "STARTING" for e in self.view.engines.values())
        if starting and self.config.admission.cold_wait_s > 0.0:
            return self._hold(record, now)
        self.stats.rejected += 1
        message = f"no engine of model {model!r} is ready{' yet, one is starting' if starting else ''}: try again"
        return [Fail(record.request.request_id, unavailable(message, retry_after_s=1.0))]

    def _refuse(self, request: RequestView, error: Error) -> list[Command]:
        self.stats.shed += 1
        self.stats.rejected += 1
        return [Fail(request.request_id, error)]

    def _hold(self, record: _Record, now: float) -> list[Command]:
        request = record.request
        self._records[request.request_id] = record
        record.queued_at = now
        queue = self._queues.get(request.model)
        if queue is None:
            fair = self.config.fairness.enabled
            queue = self._queues[request.model] = WaitingQueue(self._policy, self.counters, fair=fair)
        queue.push(request)
        self.view.waiting_since.setdefault(request.model, request.arrived_at)
        return []

    def _decide(self, request: RequestView, now: float) -> Decision | None:
        candidates = self.view.candidates(request, now, self._rng)
        if not candidates:
            return None
        candidates = self.admission.narrow(candidates, request, now)
        narrowed = self._policy.narrow(self.view, request, candidates, now)
        if not narrowed:
            return None
        decision = self._choose(request, narrowed, now)
        hold = self.config.admission.hold_above_s
        if hold is not None and decision.engine.running:
            uncached = request.prompt_tokens + request.emitted - decision.hit_tokens
            own = decision.engine.latency.ttft(uncached, decision.engine.decoding)
            if decision.engine.predicted_ttft(uncached, now) - own > hold:
                return None
        return decision

    def _choose(self, request: RequestView, engines: Sequence[EngineView], now: float) -> Decision:
        config = self.config
        if config.pd is None:
            return self._route(self.view, request, engines, now, self._rng)

        def route(some: Sequence[EngineView]) -> Decision:
            return self._route(self.view, request, some, now, self._rng)

        output = self.view.expected_output(request, config.default_output_tokens)
        return pairing.choose(self.view, request, engines, now, config.pd, output, route)

    def _dispatch(self, record: _Record, decision: Decision, now: float, *, hedge: bool = False) -> Dispatch:
        request = record.request
        context = request.prompt_tokens + request.emitted
        engine, pair = decision.engine, decision.prefill is not None
        first = decision.prefill or engine
        uncached = context - decision.hit_tokens
        ahead = first.backlog(now) + uncached
        predicted = first.latency.ttft(ahead, first.decoding)
        suspect = record.suspicion > 0.0
        prefill = self.ledger.take(first, uncached, context, now, suspect=suspect) if pair else None
        lease = self.ledger.take(engine, 1 if pair else uncached, context, now, suspect=suspect)
        engine.breaker.on_dispatch(now)
        turn = self.view.turns.get(engine.profile.device)
        if turn is not None:
            turn.sent += 1
        record.queued_at = None
        record.tries += 1
        record.attempts[record.tries] = _Attempt(lease, prefill, now, predicted, ahead, hedge=hedge)
        if request.blocks:
            self.view.prefix.record(engine.engine_id, request.blocks)
            if pair:
                self.view.prefix.record(first.engine_id, request.blocks)
        stats = self.stats
        stats.decisions += 1
        stats.prompt_tokens += request.prompt_tokens
        stats.hit_tokens += decision.hit_tokens
        stats.splits += pair
        if record.tries == 1:
            self.counters.charge(request.tenant, request.prompt_tokens, 0)
        after = None
        if self.config.hedge.enabled and not request.emitted and record.tries == 1:
            after = max(first.latency.ttft_p95(ahead, first.decoding), self.config.hedge.min_delay_s)
        return Dispatch(
            request.request_id,
            record.tries,
            engine.engine_id,
            decision.hit_tokens,
            predicted,
            hedge,
            after,
            decision.reason,
            first.engine_id if pair else "",
        )

    def _return_leases(self, attempt: _Attempt) -> None:
        """The attempt is over: whatever it holds comes back."""
        self.ledger.give_back(attempt.lease)
        if attempt.prefill is not None:
            self.ledger.give_back(attempt.prefill)
            attempt.prefill = None

    def _on_hedge(self, event: HedgeDue, now: float) -> list[Command]:
        record = self._records.get(event.request_id)
        if record is None or len(record.attempts) != 1 or record.first_at is not None:
            return []
        busy = tuple(a.lease.engine.engine_id for a in record.attempts.values())
        request = record.request
        candidates = [e for e in self.view.candidates(request, now, self._rng) if e.engine_id not in busy]
        if not candidates or not self._hedges.take(now):
            return []
        self.stats.hedges += 1
        decision = self._route(self.view, request, candidates, now, self._rng)
        return [self._dispatch(record, decision, now, hedge=True)]

    def _on_first_token(self, event: FirstToken, now: float) -> list[Command]:
        record = self._records.get(event.request_id)
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
            self.ledger.give_back(attempt.prefill)
            attempt.prefill = None
        self.stats.on_ttft(now - record.request.arrived_at, attempt.predicted, seconds, first=record.first_at is None)
        self.ledger.first_token(lease, now)
        attempt.sequences = engine.running
        attempt.context = engine.context_tokens
        engine.breaker.on_success()
        record.suspicion = 0.0
        if record.first_at is None:
            record.first_at = now
        return [self._close(record, number) for number in list(record.attempts) if number != event.attempt]

    def _close(self, record: _Record, number: int) -> Abort:
        """Give up one attempt of a sequence that goes on elsewhere or ends."""
        attempt = record.attempts.pop(number)
        self._return_leases(attempt)
        attempt.lease.engine.breaker.on_neutral()
        return Abort(record.request.request_id, number, attempt.lease.engine.engine_id)

    def _on_finished(self, event: AttemptFinished, now: float) -> list[Command]:
        record = self._records.get(event.request_id)
        attempt = record.attempts.pop(event.attempt, None) if record is not None else None
        if record is None or attempt is None:
            return []
        engine = attempt.lease.engine
        self._learn_pace(attempt, event.output_tokens - record.request.emitted, now)
        engine.completed += 1
        engine.breaker.on_success()
        self._return_leases(attempt)
        commands: list[Command] = [self._close(record, number) for number in list(record.attempts)]
        self._end(record, event.output_tokens)
        self.stats.completed += 1
        return commands + self._pump(engine.model, now)

    def _learn_pace(self, attempt: _Attempt, tokens: int, now: float) -> None:
        if attempt.first_at is None or tokens < 2:
            return
        engine = attempt.lease.engine
        seconds = (now - attempt.first_at) / (tokens - 1)
        self.stats.on_tpot(seconds)
        # The load changed while it decoded: the mean of both ends is what the request saw.
        sequences = (attempt.sequences + engine.running) / 2
        engine.latency.learn_tpot(sequences, (attempt.context + engine.context_tokens) / 2, seconds)

    def _end(self, record: _Record, output_tokens: int) -> None:
        request = record.request
        del self._records[request.request_id]
        self._ended[request.model] = self._ended.get(request.model, 0) + 1
        self.counters.charge(request.tenant, 0, output_tokens)
        self.stats.output_tokens += output_tokens
        means = self.view.output_tokens
        means[request.model] = means.get(request.model, float(output_tokens)) * 0.98 + output_tokens * 0.02

    def _on_failed(self, event: AttemptFailed, now: float) -> list[Command]:
        record = self._records.get(event.request_id)
        attempt = record.attempts.pop(event.attempt, None) if record is not None else None
        if record is None or attempt is None:
            return []
        engine = attempt.lease.engine
        died = event.error.code is ErrorCode.ENGINE_DIED
        if died:
            share = migration.blame(engine, now, progressed=attempt.first_at is not None, suspect=attempt.lease.suspect)
            record.suspicion += share
        self._return_leases(attempt)
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
        final = self._verdict(record, event.error, now)
        if final is not None:
            self._end(record, request.emitted)
            self.stats.failed += 1
            return [*commands, Fail(request.request_id, final), *self._pump(engine.model, now)]
        request.avoid = (engine.engine_id,)
        request.suspect = record.suspicion > 0.0
        decision = self._decide(request, now) if self.view.ready.get(request.model) else None
        if decision is None:
            return commands + self._hold(record, now) + self._pump(engine.model, now)
        commands.append(self._dispatch(record, decision, now))
        return commands + self._pump(engine.model, now)

    def _verdict(self, record: _Record, error: Error, now: float) -> Error | None:
        """Return the error to tell the client, or None when the sequence is sent on."""
        request = record.request
        if not error.retryable:
            return error
        stop = self._no_more_tries(record, error, now)
        if stop is not None or request.emitted:
            self.stats.migrations += stop is None
            return stop
        if not self._retries.take(now):
            return unavailable(f"the retry budget is spent; the attempt failed with: {error.message}", 1.0)
        self.stats.retries += 1
        return None

    def _no_more_tries(self, record: _Record, error: Error, now: float) -> Error | None:
        """Return why a retryable failure is final for this sequence, budget aside."""
        config = self.config.retry
        if record.suspicion >= config.poison_limit:
            self.stats.poisoned += 1
            return Error(
                code=ErrorCode.ENGINE_DIED,
                message=f"{record.tries} engines ended while they held this request: it is not sent to another one",
            )
        if record.tries >= config.max_attempts:
            if error.code is ErrorCode.RESOURCE_EXHAUSTED:
                return error  # every engine was full, none was away: that is a 429, not a 503
            return unavailable(f"{record.tries} attempts failed, the last one with: {error.message}")
        if record.request.emitted and record.request.journal == "none":
            return unavailable(f"the engine cannot continue elsewhere what it began: {error.message}")
        if record.request.deadline_at <= now:
            return Error(code=ErrorCode.DEADLINE_EXCEEDED, message="the request's deadline passed while it was retried")
        return None

    def _on_cancelled(self, event: RequestCancelled, now: float) -> list[Command]:
        record = self._records.get(event.request_id)
        if record is None:
            return []
        commands: list[Command] = [self._close(record, number) for number in list(record.attempts)]
        if record.queued_at is not None:
            self._queues[record.request.model].remove(event.request_id)
        self._end(record, max(event.output_tokens, record.request.emitted))
        if event.finished:
            self.stats.completed += 1
        else:
            self.stats.cancelled += 1
        return commands + self._pump(record.request.model, now)

    # -- the queue -------------------------------------------------------------------------------------------------

    def _pump(self, model: str, now: float) -> list[Command]:
        """Send waiting requests while there is room; where models take turns on a device, the others' as well."""
        commands = self._pump_one(model, now)
        if self.view.turns:
            for other, queue in self._queues.items():
                if queue and other != model:
                    commands += self._pump_one(other, now)
        return commands

    def _pump_one(self, model: str, now: float) -> list[Command]:
        queue = self._queues.get(model)
        if not queue:
            self.view.waiting_since.pop(model, None)
            return []
        commands: list[Command] = []
        while (request := queue.peek()) is not None:
            decision = self._decide(request, now) if self.view.ready.get(model) else None
            if decision is None:
                break
            queue.remove(request.request_id)
            record = self._records[request.request_id]
            late = self.admission.judge(request, decision, now)
            if late is not None:
                del self._records[request.request_id]
                commands += self._refuse(request, admission.refusal(request, late))
                continue
            commands.append(self._dispatch(record, decision, now))
        head = queue.peek()
        if head is None:
            self.view.waiting_since.pop(model, None)
        else:
            self.view.waiting_since[model] = head.arrived_at
        return commands

    def _strand(self, model: str, now: float) -> list[Command]:
        """An engine went away: fail what waits for a model that nobody serves any more."""
        queue = self._queues.get(model)
        if not queue or self.view.ready.get(model):
            return []
        return self._expire(queue, now)

    def _expire(self, queue: WaitingQueue, now: float) -> list[Command]:
        commands: list[Command] = []
        for request in list(queue):
            error = self._overdue(request, now)
            if error is not None:
                queue.remove(request.request_id)
                self._end(self._records[request.request_id], request.emitted)
                self.stats.failed += 1
                commands.append(Fail(request.request_id, error))
        return commands

    def _overdue(self, request: RequestView, now: float) -> Error | None:
        """Return why a waiting request has waited enough, or None."""
        if request.deadline_at <= now and not request.emitted:
            return Error(
                code=ErrorCode.DEADLINE_EXCEEDED,
                message=f"the deadline of {request.deadline_s:.2f} s passed while the request waited for an engine",
            )
        if self.view.ready.get(request.model):
            return None
        record = self._records[request.request_id]
        waited = now - (record.queued_at if record.queued_at is not None else now)
        retry = self.config.retry
        if request.emitted:
            patience = retry.recovery_wait_s
        elif record.tries:
            patience = retry.retry_wait_s
        else:
            patience = max(self.config.admission.cold_wait_s, retry.retry_wait_s)
        if waited < patience:
            return None
        return record.last_error or unavailable(
            f"no engine of model {request.model!r} became ready within {waited:.1f} s: try again", retry_after_s=1.0
        )

    def _on_policy(self, event: PolicyChanged, _now: float) -> list[Command]:
        # Both names are checked before anything changes.
        policy = policy_named(event.scheduling_policy) if event.scheduling_policy else self._policy
        route = route_named(event.routing_strategy) if event.routing_strategy else self._route
        if policy is not self._policy:
            self._policy = policy
            self._queues = {model: queue.ordered_copy(policy) for model, queue in self._queues.items()}
        self._route = route
        self.routing_strategy = event.routing_strategy or self.routing_strategy
        return []

    def _on_tick(self, _event: Tick, now: float) -> list[Command]:
        commands: list[Command] = []
        for model, queue in self._queues.items():
            if queue:
                commands += self._expire(queue, now)
                commands += self._pump(model, now)
        return commands
