"""The core under every order of events: counters return to zero, nothing is sent twice, nothing is lost."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm_control_plane.config import AdmissionConfig, CoreConfig, HedgeConfig, RetryConfig
from sagellm_control_plane.events import (
    Abort,
    AttemptFailed,
    AttemptFinished,
    Dispatch,
    EngineDied,
    EngineJoined,
    EngineLeft,
    EngineStateChanged,
    Fail,
    FirstToken,
    HedgeDue,
    PolicyChanged,
    ProbeNow,
    RequestArrived,
    RequestCancelled,
    Tick,
)
from sagellm_control_plane.policies import POLICIES
from sagellm_control_plane.routing import ROUTES
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import EngineProfile, RequestView
from sagellm_protocol.errors import Error, ErrorCode

DIED = Error(code=ErrorCode.ENGINE_DIED, message="died", retryable=True)
BUSY = Error(code=ErrorCode.RESOURCE_EXHAUSTED, message="busy", retryable=True)
WRONG = Error(code=ErrorCode.INVALID_ARGUMENT, message="wrong")

BLOCKS = [i.to_bytes(8, "big") for i in range(12)]


class ControlPlane(RuleBasedStateMachine):
    """Plays engines and clients; keeps its own books of what is open."""

    def __init__(self) -> None:
        super().__init__()
        config = CoreConfig(
            admission=AdmissionConfig(max_waiting=6),
            hedge=HedgeConfig(enabled=True, budget_ratio=0.5),
            retry=RetryConfig(max_attempts=5, budget_min=20, retry_wait_s=1.0, recovery_wait_s=3.0),
        )
        self.state = ControlState(config, random.Random(1))
        self.now = 0.0
        self.serial = 0
        self.engines: dict[str, str] = {}
        self.requests: dict[str, str] = {}  # id -> open | done
        self.attempts: dict[tuple[str, int], str] = {}
        self.begun: set[tuple[str, int]] = set()
        self.emitted: dict[str, int] = {}

    def feed(self, event) -> None:
        for command in self.state.on_event(event, self.now):
            match command:
                case Dispatch(request_id=request, attempt=number, engine_id=engine):
                    assert self.requests[request] == "open"
                    assert (request, number) not in self.attempts, "an attempt was dispatched twice"
                    assert self.engines[engine] == "READY", "sent to an engine that is not ready"
                    running = [key for key in self.attempts if key[0] == request]
                    assert len(running) <= 1
                    assert not running or command.hedge, "two attempts at once without a hedge"
                    self.attempts[request, number] = engine
                case Abort(request_id=request, attempt=number, engine_id=engine):
                    assert self.attempts.pop((request, number)) == engine
                    self.begun.discard((request, number))
                case Fail(request_id=request):
                    assert self.requests[request] == "open"
                    assert not [key for key in self.attempts if key[0] == request], "failed with an attempt running"
                    self.requests[request] = "done"
                case ProbeNow(engine_id=engine):
                    self.engines[engine] = "ERROR"

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    @rule(slots=st.integers(1, 3))
    @precondition(lambda self: len(self.engines) < 4)
    def engine_joins(self, slots):
        self.serial += 1
        name = f"e{self.serial}"
        self.engines[name] = "STARTING"
        self.feed(EngineJoined(EngineProfile(engine_id=name, model="m", slots=slots, n_blocks=8)))

    @rule(data=st.data(), state=st.sampled_from(["READY", "READY", "READY", "DRAINING", "STARTING"]))
    @precondition(lambda self: self.engines)
    def engine_changes(self, data, state):
        name = data.draw(st.sampled_from(sorted(self.engines)))
        self.engines[name] = state
        self.feed(EngineStateChanged(name, state, fresh=True))

    @rule(data=st.data(), restarting=st.booleans(), told_first=st.booleans())
    @precondition(lambda self: self.engines)
    def engine_dies(self, data, restarting, told_first):
        name = data.draw(st.sampled_from(sorted(self.engines)))
        lost = sorted(key for key, engine in self.attempts.items() if engine == name)
        if told_first:
            self.engines[name] = "STARTING" if restarting else "ERROR"
            self.feed(EngineDied(name, restarting))
        for key in lost:
            if key in self.attempts:
                self.fail(key, DIED)
        if not told_first:
            self.engines[name] = "STARTING" if restarting else "ERROR"
            self.feed(EngineDied(name, restarting))

    @rule(data=st.data())
    @precondition(lambda self: self.engines)
    def engine_leaves(self, data):
        name = data.draw(st.sampled_from(sorted(self.engines)))
        del self.engines[name]
        self.feed(EngineLeft(name))
        for key in sorted(key for key, engine in self.attempts.items() if engine == name):
            if key in self.attempts:
                self.fail(key, DIED)

    @rule(
        priority=st.integers(0, 4),
        tenant=st.sampled_from(["", "a", "b"]),
        deadline=st.sampled_from([None, 0.5, 30.0]),
        depth=st.integers(0, 6),
        start=st.integers(0, 5),
    )
    def request_arrives(self, priority, tenant, deadline, depth, start):
        self.serial += 1
        name = f"r{self.serial}"
        self.requests[name] = "open"
        self.emitted[name] = 0
        view = RequestView(
            request_id=name,
            model="m",
            prompt_tokens=depth * 16 + 5,
            blocks=tuple(BLOCKS[start : start + depth]),
            block_tokens=16,
            priority=priority,
            tenant=tenant,
            deadline_s=deadline,
            arrived_at=self.now,
        )
        self.feed(RequestArrived(view))

    def fail(self, key, error) -> None:
        del self.attempts[key]
        self.begun.discard(key)
        self.feed(AttemptFailed(key[0], key[1], error, self.emitted[key[0]]))

    @rule(data=st.data(), tokens=st.integers(1, 3))
    @precondition(lambda self: set(self.attempts) - self.begun)
    def first_token(self, data, tokens):
        key = data.draw(st.sampled_from(sorted(set(self.attempts) - self.begun)))
        if any(other[0] == key[0] for other in self.begun):
            return
        self.begun.add(key)
        self.emitted[key[0]] += tokens
        self.now += 0.01
        self.feed(FirstToken(key[0], key[1]))

    @rule(data=st.data())
    @precondition(lambda self: self.begun)
    def finishes(self, data):
        key = data.draw(st.sampled_from(sorted(self.begun)))
        self.begun.discard(key)
        del self.attempts[key]
        self.requests[key[0]] = "done"
        self.now += 0.02
        self.feed(AttemptFinished(key[0], key[1], self.emitted[key[0]]))

    @rule(data=st.data(), error=st.sampled_from([DIED, BUSY, BUSY, WRONG]))
    @precondition(lambda self: self.attempts)
    def attempt_fails(self, data, error):
        self.fail(data.draw(st.sampled_from(sorted(self.attempts))), error)

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def client_leaves(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.feed(RequestCancelled(name))
        self.requests[name] = "done"

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def hedge_is_due(self, data):
        self.feed(HedgeDue(data.draw(st.sampled_from(sorted(self.requests)))))

    @rule(seconds=st.floats(0.0, 5.0))
    def time_passes(self, seconds):
        self.tick(seconds)

    @rule(policy=st.sampled_from(sorted(POLICIES)), route=st.sampled_from(sorted(ROUTES)))
    def policy_changes(self, policy, route):
        self.feed(PolicyChanged(policy, route))

    @invariant()
    def books_agree(self):
        assert self.state.ledger.open == len(self.attempts)
        for name, engine in self.state.view.engines.items():
            mine = [key for key, where in self.attempts.items() if where == name]
            assert engine.running == len(mine)
            assert engine.decoding == sum(key in self.begun for key in mine)
            assert engine.context_tokens >= 0
            assert engine.prefill_tokens >= 0
            assert (engine.prefill_tokens > 0) == (engine.running > engine.decoding)
        waiting_or_running = {name for name, status in self.requests.items() if status == "open"}
        assert self.state.active == len(waiting_or_running)

    def teardown(self):
        for key in sorted(self.attempts):
            if key in self.attempts:
                self.requests[key[0]] = "done"
                self.feed(RequestCancelled(key[0]))
        for name, status in self.requests.items():
            if status == "open":
                self.requests[name] = "done"
                self.feed(RequestCancelled(name))
        assert (self.state.active, self.state.ledger.open, self.state.waiting()) == (0, 0, 0)
        for engine in self.state.view.engines.values():
            counters = (engine.running, engine.decoding, engine.prefill_tokens, engine.context_tokens, engine.suspects)
            assert counters == (0, 0, 0, 0, 0)


TestControlPlane = ControlPlane.TestCase
TestControlPlane.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
