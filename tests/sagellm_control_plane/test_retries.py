"""Attempts that fail before the first token: how often they are tried again, and what is counted."""

from __future__ import annotations

import random

from sagellm_control_plane.config import CoreConfig, RetryConfig
from sagellm_control_plane.events import (
    AttemptFailed,
    Dispatch,
    EngineJoined,
    EngineStateChanged,
    Fail,
    FirstToken,
    RequestArrived,
)
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import EngineProfile, RequestView
from sagellm_protocol.errors import Error, ErrorCode

BUSY = Error(code=ErrorCode.UNAVAILABLE, message="busy", retryable=True)
DIED = Error(code=ErrorCode.ENGINE_DIED, message="gone", retryable=True)


def plane(**retry) -> ControlState:
    state = ControlState(CoreConfig(retry=RetryConfig(**retry)), random.Random(1))
    for name in "abcd":
        state.on_event(EngineJoined(EngineProfile(engine_id=name, model="m", slots=64)), 0.0)
        state.on_event(EngineStateChanged(name, "READY", fresh=True), 0.0)
    return state


def arrive(state: ControlState, name: str, **more) -> Dispatch:
    view = RequestView(request_id=name, model="m", prompt_tokens=10, arrived_at=1.0, **more)
    (command,) = state.on_event(RequestArrived(view), 1.0)
    assert isinstance(command, Dispatch)
    return command


def test_retries_are_bounded_by_their_budget():
    """With a budget of two, the third failure before a first token is the client's, with what the engine said."""
    state = plane(budget_ratio=0.0, budget_min=2.0)
    for name in ("x", "y"):
        arrive(state, name)
        (again,) = state.on_event(AttemptFailed(name, 1, BUSY), 1.0)
        assert isinstance(again, Dispatch)
        assert again.attempt == 2
    arrive(state, "z")
    (failed,) = state.on_event(AttemptFailed("z", 1, BUSY), 1.0)
    assert isinstance(failed, Fail)
    assert "retry budget is spent" in failed.error.message
    assert "busy" in failed.error.message
    assert (state.stats.retries, state.stats.reasons["retries"]) == (2, {"unavailable": 2})


def test_a_retry_goes_to_another_engine():
    """The engine that failed is avoided while another is there."""
    state = plane()
    first = arrive(state, "x")
    (again,) = state.on_event(AttemptFailed("x", 1, BUSY), 1.0)
    assert again.engine_id != first.engine_id


def test_a_stream_that_has_begun_needs_no_budget():
    """After the first token a stream goes on although the budget of retries is spent, and its reason is counted."""
    state = plane(budget_ratio=0.0, budget_min=0.0)
    arrive(state, "x")
    state.on_event(FirstToken("x", 1), 1.1)
    commands = state.on_event(AttemptFailed("x", 1, DIED, 5), 1.2)
    assert isinstance(commands[-1], Dispatch)
    assert (state.stats.migrations, state.stats.reasons["migrations"]) == (1, {"engine_died": 1})
    assert state.emitted("x") == 5


def test_what_cannot_be_retried_is_told_at_once():
    """An error that is the request's own fault is never sent to a second engine."""
    state = plane()
    arrive(state, "x")
    wrong = Error(code=ErrorCode.INVALID_ARGUMENT, message="no such field")
    assert state.on_event(AttemptFailed("x", 1, wrong), 1.1) == [Fail("x", wrong)]
    assert (state.active, state.ledger.open) == (0, 0)


def test_a_deadline_ends_the_retries():
    """A request whose deadline has passed is failed with that, not sent on."""
    state = plane()
    arrive(state, "x", deadline_s=0.5)
    (failed,) = state.on_event(AttemptFailed("x", 1, BUSY), 2.0)
    assert isinstance(failed, Fail)
    assert failed.error.code is ErrorCode.DEADLINE_EXCEEDED
