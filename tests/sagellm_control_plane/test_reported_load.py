"""Load that others put on an engine: another gateway, or an earlier one whose streams still run."""

from __future__ import annotations

import random

import pytest

from sagellm_control_plane.config import CoreConfig, HealthConfig
from sagellm_control_plane.events import (
    AttemptFinished,
    Dispatch,
    EngineJoined,
    EngineReported,
    EngineStateChanged,
    RequestArrived,
    Tick,
)
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import EngineProfile, RequestView
from sagellm_protocol.engine import EngineStatus


def plane(routing: str = "load_balanced", slots: int = 8) -> ControlState:
    config = CoreConfig(routing_strategy=routing, health=HealthConfig(stale_s=5.0))
    state = ControlState(config, random.Random(1))
    for name in ("a", "b"):
        state.on_event(EngineJoined(EngineProfile(engine_id=name, model="m", slots=slots)), 0.0)
        state.on_event(EngineStateChanged(name, "READY", fresh=True), 0.0)
    return state


def report(state: ControlState, now: float, running: int, waiting: int = 0, engine: str = "a") -> None:
    steps = int(now * 100)
    status = EngineStatus(engine_id=engine, running=running, waiting=waiting, steps=steps)
    state.on_event(EngineReported(status), now)


def place(state: ControlState, number: int, now: float) -> str:
    view = RequestView(request_id=f"r{number}", model="m", prompt_tokens=100, arrived_at=now)
    (command,) = state.on_event(RequestArrived(view), now)
    assert isinstance(command, Dispatch)
    return command.engine_id


@pytest.mark.parametrize("routing", ["least_loaded", "lmetric", "consistent_hash"])
def test_an_engine_that_others_use_gets_less(routing):
    """After a restart our books are empty: what an engine reports keeps new requests off it."""
    state = plane(routing)
    report(state, 1.0, running=6)
    report(state, 2.0, running=6)
    chosen = [place(state, i, 2.0) for i in range(4)]
    assert chosen.count("b") >= 3


@pytest.mark.parametrize("routing", ["load_balanced", "predicted_latency"])
def test_a_pace_that_others_have_spoiled_is_predicted(routing):
    """Where others' sequences would hold the pace of tokens beyond the objective, the other engine takes the request."""
    state = plane(routing, slots=512)
    report(state, 1.0, running=200)
    report(state, 2.0, running=200)
    assert [place(state, i, 2.0) for i in range(4)] == ["b"] * 4


def test_one_report_alone_proves_nothing():
    """A single report is older than our own books: what has just ended here may still be in it."""
    state = plane()
    report(state, 1.0, running=6)
    assert state.view.engines["a"].others == 0
    report(state, 2.0, running=4, waiting=1)
    assert state.view.engines["a"].others == 5
    report(state, 3.0, running=0)
    assert state.view.engines["a"].others == 0


def test_our_own_sequences_are_not_others():
    """What we sent is in our books; a report that repeats it adds nothing."""
    state = plane("round_robin")
    for i in range(4):
        place(state, i, 0.5)
    report(state, 1.0, running=2)
    report(state, 2.0, running=2)
    assert (state.view.engines["a"].others, state.view.engines["a"].load) == (0, 2)


def test_short_requests_that_have_just_ended_are_not_others():
    """With many short requests every report shows some that have ended here meanwhile: none of them is taken for another's."""
    state = plane("round_robin")
    for second in (1, 2, 3):
        names = range(10 * second, 10 * second + 8)
        for number in names:
            place(state, number, second - 0.5)
        for number in names:
            state.on_event(AttemptFinished(f"r{number}", 1, 4), second - 0.1)
        report(state, float(second), running=4)
        assert state.view.engines["a"].load == 0


def test_a_stale_report_is_not_believed():
    """An engine that has said nothing for the stale time counts with what we sent alone."""
    state = plane()
    report(state, 1.0, running=6)
    report(state, 2.0, running=6)
    state.on_event(Tick(), 6.0)
    assert state.view.engines["a"].others == 6
    state.on_event(Tick(), 7.1)
    assert state.view.engines["a"].others == 0


def test_an_engine_that_others_have_filled_is_left_alone():
    """No request is sent to an engine without a free slot while another has one, and none is lost when both are full."""
    state = plane("round_robin", slots=4)
    for engine in ("a", "b"):
        report(state, 1.0, running=6, engine=engine)
        report(state, 2.0, running=6, engine=engine)
    view = RequestView(request_id="r", model="m", prompt_tokens=10, arrived_at=2.0)
    assert state.on_event(RequestArrived(view), 2.0) == []
    assert state.waiting("m") == 1
    report(state, 3.0, running=0, engine="b")
    (command,) = state.on_event(Tick(), 3.1)
    assert isinstance(command, Dispatch)
    assert command.engine_id == "b"
