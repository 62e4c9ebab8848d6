"""The simulator: a heap of events around the same `ControlState` that serves live traffic."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import msgspec

from sagellm_control_plane.config import CoreConfig, LatencyPrior
from sagellm_control_plane.events import (
    Abort,
    AttemptFailed,
    AttemptFinished,
    Command,
    Dispatch,
    EngineDied,
    EngineJoined,
    EngineReported,
    EngineStateChanged,
    Event,
    Fail,
    FirstToken,
    HedgeDue,
    ProbeNow,
    RequestArrived,
    RestartHung,
    Tick,
)
from sagellm_control_plane.sim.engine_model import EngineConstants, SimEngine, SimSequence
from sagellm_control_plane.sim.faults import Fault
from sagellm_control_plane.sim.traces import SimRequest
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import EngineProfile, RequestView
from sagellm_protocol.engine import EngineStatus
from sagellm_protocol.errors import Error, ErrorCode

__all__ = ["Outcome", "SimCluster", "SimResult", "simulate"]


class Outcome(msgspec.Struct, gc=False):
    """What became of one request; times in seconds of the simulation, NaN where there is none."""

    at: float
    prompt_tokens: int
    output_tokens: int
    priority: int
    first_at: float = float("nan")
    end_at: float = float("nan")
    failed: bool = False
    refused: bool = False
    moves: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first_at - self.at

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens; 0 for a single token."""
        return (self.end_at - self.first_at) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class SimResult(msgspec.Struct, kw_only=True):
    """Outcomes and counters of one run."""

    outcomes: list[Outcome]
    state: ControlState
    engines: list[SimEngine]
    wall_s: float
    cpu_s: float
    decision_s: float
    placement_s: float
    events: int
    simulated_s: float

    def goodput(self, ttft_s: float, tpot_s: float, priority: int | None = None) -> float:
        """Share of all arrivals (of one band) that met both objectives; refused and failed ones have missed them."""
        rows = [o for o in self.outcomes if priority is None or o.priority == priority]
        good = sum(o.ttft <= ttft_s and o.tpot <= tpot_s and not o.failed and not o.refused for o in rows)
        return good / len(rows) if rows else float("nan")

    @property
    def placement_us(self) -> float:
        """Mean microseconds of CPU time from a request's arrival to its placement."""
        arrived = self.state.stats.arrived
        return self.placement_s / arrived * 1e6 if arrived else 0.0

    @property
    def decision_us(self) -> float:
        """The same for all that the core does about one request, learning from its first token and its end included."""
        arrived = self.state.stats.arrived
        return self.decision_s / arrived * 1e6 if arrived else 0.0


class SimCluster:
    """Engines, the control plane, and the clock between them."""

    def __init__(
        self,
        config: CoreConfig,
        engines: Iterable[tuple[EngineProfile, EngineConstants]],
        *,
        seed: int = 0,
        tick_s: float = 0.1,
        report_s: float = 0.0,
        network_s: float = 0.0,
        measure: bool = False,
    ) -> None:
        self.state = ControlState(config, random.Random(seed))  # noqa: S311 - simulation
        self.rng = random.Random(seed + 1)  # noqa: S311 - faults
        self.engines: dict[str, SimEngine] = {}
        self.now = 0.0
        self.decision_s = 0.0
        self.placement_s = 0.0
        self.events = 0
        self.drop = 0.0
        self.report_delay = 0.0
        self.outcomes: dict[str, Outcome] = {}
        self._requests: dict[str, SimRequest] = {}
        self._split: dict[tuple[str, int], tuple[SimSequence, str]] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = count()
        self._tick_s = tick_s
        self._report_s = report_s
        self._network_s = network_s
        self._measure = measure
        self._ticking = False
        self._pending = 0
        for profile, constants in engines:
            self.add_engine(profile, constants)

    # -- engines ---------------------------------------------------------------------------------------------------

    def add_engine(self, profile: EngineProfile, constants: EngineConstants) -> SimEngine:
        """Add an engine that is READY now."""
        engine = SimEngine(profile.engine_id, constants)
        self.engines[profile.engine_id] = engine
        self._feed(EngineJoined(profile))
        self._feed(EngineStateChanged(profile.engine_id, "READY", True))
        if self._report_s > 0.0:
            self._at(self.now + self._report_s, self._report, engine)
        return engine

    def crash(self, engine_id: str, down_s: float | None) -> None:
        """An engine ends; it is back after `down_s`."""
        engine = self.engines[engine_id]
        lost = engine.crash()
        self._feed(EngineDied(engine_id, down_s is not None))
        error = Error(code=ErrorCode.ENGINE_DIED, message=f"engine {engine_id} crashed", retryable=True)
        for sequence in lost:
            self._attempt_failed(sequence, error)
        if down_s is not None:
            self._at(self.now + down_s, self._restart, engine)

    def _restart(self, engine: SimEngine) -> None:
        engine.alive = True
        self._feed(EngineStateChanged(engine.engine_id, "READY", True))

    def _attempt_failed(self, sequence: SimSequence, error: Error) -> None:
        self.outcomes[sequence.request_id].moves += 1
        self._feed(AttemptFailed(sequence.request_id, sequence.attempt, error, self._emitted(sequence)))

    def _emitted(self, sequence: SimSequence) -> int:
        """Tokens that had reached the router when the attempt ended, of the whole request."""
        request = self._requests[sequence.request_id]
        if sequence.first_at is None:
            return request.output_tokens - sequence.output_tokens
        return request.output_tokens - sequence.output_tokens + sequence.generated

    def stall(self, engine_id: str, duration_s: float) -> None:
        """An engine makes no progress for a while."""
        engine = self.engines[engine_id]
        engine.stalled = True
        self._at(self.now + duration_s, self._unstall, engine, duration_s)

    def _unstall(self, engine: SimEngine, duration_s: float) -> None:
        if engine.stalled:
            engine.stalled = False
            if engine.next_at != float("inf"):
                engine.next_at += duration_s
                engine._run_start += duration_s
            self._schedule(engine)

    def _report(self, engine: SimEngine) -> None:
        if engine.alive:
            status = EngineStatus(
                engine_id=engine.engine_id,
                running=len(engine.sequences) - engine.waiting,
                waiting=engine.waiting,
                steps=engine.steps,
            )
            self._at(self.now + self.report_delay, self._feed, EngineReported(status))
        if self._pending:
            self._at(self.now + self._report_s, self._report, engine)

    # -- events ----------------------------------------------------------------------------------------------------

    def _at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._heap, (when, next(self._serial), action, args))

    def _feed(self, event: Event) -> None:
        if self._measure:
            # CPU time of this thread: what other processes do on this core is not a decision's cost.
            began = time.thread_time()
            commands = self.state.on_event(event, self.now)
            spent = time.thread_time() - began
            self.decision_s += spent
            if type(event) is RequestArrived:
                self.placement_s += spent
        else:
            commands = self.state.on_event(event, self.now)
        for command in commands:
            self._carry_out(command)
        if not self._ticking and self.state.waiting():
            self._ticking = True
            self._at(self.now + self._tick_s, self._tick)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Dispatch():
                self._dispatch(command)
            case Fail(request_id=request_id, error=error):
                outcome = self.outcomes[request_id]
                refused = error.code is ErrorCode.RESOURCE_EXHAUSTED
                outcome.refused, outcome.failed = refused, not refused
                self._pending -= 1
            case Abort(request_id=request_id, attempt=number, engine_id=engine_id):
                engine = self.engines[engine_id]
                self._advance(engine)
                engine.abort(request_id, number, self.now)
                self._schedule(engine)
            case ProbeNow(engine_id=engine_id):
                self._at(self.now + 0.001, self._probe, engine_id)
            case RestartHung(engine_id=engine_id):
                self.engines[engine_id].stalled = False
                self.crash(engine_id, self.engines[engine_id].constants.load_s)
            case _:
                raise NotImplementedError(f"the simulator has no {type(command).__name__}")

    def _probe(self, engine_id: str) -> None:
        if self.engines[engine_id].alive:
            self._feed(EngineStateChanged(engine_id, "READY"))

    def _dispatch(self, command: Dispatch) -> None:
        if command.hedge_after_s is not None:
            self._at(self.now + command.hedge_after_s, self._feed, HedgeDue(command.request_id))
        if self._network_s > 0.0:
            self._at(self.now + self._network_s, self._deliver, command)
        else:
            self._deliver(command)

    def _deliver(self, command: Dispatch) -> None:
        request = self._requests[command.request_id]
        engine = self.engines[command.engine_id]
        emitted = self.state.emitted(command.request_id)
        sequence = SimSequence(
            command.request_id,
            command.attempt,
            request.prompt_tokens + emitted,
            request.output_tokens - emitted,
            request.blocks,
        )
        if not engine.alive or (self.drop and self.rng.random() < self.drop):
            code = ErrorCode.UNAVAILABLE if engine.alive else ErrorCode.ENGINE_DIED
            error = Error(code=code, message="the request did not arrive", retryable=True)
            self._at(self.now, self._attempt_failed, sequence, error)
            return
        if sequence.output_tokens <= 0:
            self._at(self.now, self._feed, AttemptFinished(command.request_id, command.attempt, request.output_tokens))
            self._finished(command.request_id)
            return
        if command.prefill_engine_id:
            # The prompt runs as a sequence of one token elsewhere; the hand-over begins with its end.
            engine = self.engines[command.prefill_engine_id]
            self._split[command.request_id, command.attempt] = (sequence, command.engine_id)
            sequence = SimSequence(command.request_id, command.attempt, sequence.prompt_tokens, 1, request.blocks)
        self._advance(engine)
        engine.submit(sequence, self.now)
        self._schedule(engine)

    def _hand_over(self, sequence: SimSequence, engine_id: str) -> None:
        """The KV of a prompt has arrived: the rest is decoded here."""
        engine = self.engines[engine_id]
        if self.outcomes[sequence.request_id].end_at == self.outcomes[sequence.request_id].end_at:
            return
        self._advance(engine)
        sequence.handed = sequence.prompt_tokens
        sequence.prompt_tokens += 1
        sequence.output_tokens -= 1
        engine.submit(sequence, self.now)
        self._schedule(engine)

    def _schedule(self, engine: SimEngine) -> None:
        if engine.next_at != float("inf") and not engine.stalled:
            self._at(max(engine.next_at, self.now), self._engine_due, engine, engine.version, engine.next_at)

    def _engine_due(self, engine: SimEngine, version: int, next_at: float) -> None:
        if engine.version != version or engine.next_at != next_at:
            return  # the run was cut or replaced meanwhile
        self._advance(engine)
        self._schedule(engine)

    def _advance(self, engine: SimEngine) -> None:
        for kind, sequence, when in engine.advance(self.now):
            outcome = self.outcomes[sequence.request_id]
            split = self._split.get((sequence.request_id, sequence.attempt)) if self._split else None
            if split is not None and split[0] is not sequence:
                if kind == "finish":
                    self._prefilled(sequence, *split)
                    continue
            elif split is not None and kind == "first":
                continue
            if kind == "first":
                if outcome.first_at != outcome.first_at:
                    outcome.first_at = when
                self._feed(FirstToken(sequence.request_id, sequence.attempt, sequence.cached))
            else:
                output = self._requests[sequence.request_id].output_tokens
                self._feed(AttemptFinished(sequence.request_id, sequence.attempt, output))
                self._finished(sequence.request_id)

    def _prefilled(self, first: SimSequence, rest: SimSequence, engine_id: str) -> None:
        pd = self.state.config.pd
        assert pd is not None
        if rest.output_tokens <= 1:
            del self._split[first.request_id, first.attempt]
            self._feed(AttemptFinished(first.request_id, first.attempt, 1))
            self._finished(first.request_id)
            return
        rest.first_at = first.first_at
        transfer = first.prompt_tokens * pd.kv_bytes_per_token / pd.transfer_bytes_per_s
        self._at(self.now + transfer, self._hand_over, rest, engine_id)

    def _finished(self, request_id: str) -> None:
        self.outcomes[request_id].end_at = self.now
        self._pending -= 1

    def _tick(self) -> None:
        self._ticking = False
        self._feed(Tick())

    # -- a run -----------------------------------------------------------------------------------------------------

    def run(self, requests: Sequence[SimRequest], faults: Sequence[Fault] = ()) -> SimResult:
        """Serve `requests` to the end, or until nothing can happen any more."""
        began, cpu = time.perf_counter(), time.thread_time()
        for fault in faults:
            self._at(fault.at, fault.apply, self)
        self._pending += len(requests)
        arrivals = iter(enumerate(requests))
        coming = next(arrivals, None)
        heap = self._heap
        while heap or coming is not None:
            if coming is not None and (not heap or coming[1].at <= heap[0][0]):
                self.now = max(self.now, coming[1].at)
                self._arrive(*coming)
                coming = next(arrivals, None)
            else:
                when, _serial, action, args = heapq.heappop(heap)
                self.now = max(self.now, when)
                action(*args)
            self.events += 1
            if not self._pending and coming is None:
                break
        return SimResult(
            outcomes=list(self.outcomes.values()),
            state=self.state,
            engines=list(self.engines.values()),
            wall_s=time.perf_counter() - began,
            cpu_s=time.thread_time() - cpu,
            decision_s=self.decision_s,
            placement_s=self.placement_s,
            events=self.events,
            simulated_s=self.now,
        )

    def _arrive(self, serial: int, request: SimRequest) -> None:
        request_id = f"q{serial}"
        self._requests[request_id] = request
        self.outcomes[request_id] = Outcome(request.at, request.prompt_tokens, request.output_tokens, request.priority)
        view = RequestView(
            request_id=request_id,
            model=request.model,
            prompt_tokens=request.prompt_tokens,
            blocks=request.blocks,
            block_tokens=request.block_tokens,
            priority=request.priority,
            tenant=request.tenant,
            arrived_at=self.now,
        )
        self._feed(RequestArrived(view))


def simulate(
    requests: Sequence[SimRequest],
    config: CoreConfig,
    *,
    engines: int,
    constants: EngineConstants | None = None,
    seed: int = 0,
    faults: Sequence[Fault] = (),
    **options: Any,
) -> SimResult:
    """Run `requests` on a cluster of equal engines; `options` go to `SimCluster`."""
    constants = constants or EngineConstants()
    prior = LatencyPrior(
        prefill_tps=constants.prefill_tps,
        step_s=constants.step_s,
        step_per_sequence_s=constants.per_sequence_s,
        step_per_token_s=constants.per_token_s,
    )
    models = sorted({request.model for request in requests})
    fleet = [
        (
            EngineProfile(
                engine_id=f"e{i}",
                model=models[i % len(models)],
                slots=constants.max_sequences,
                block_size=constants.block_size,
                n_blocks=constants.n_blocks,
                prior=prior,
            ),
            constants,
        )
        for i in range(engines)
    ]
    return SimCluster(config, fleet, seed=seed, **options).run(requests, faults)
