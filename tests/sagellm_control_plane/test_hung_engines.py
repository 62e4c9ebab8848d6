"""When the core calls an engine hung."""

import random

import msgspec

from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import EngineJoined, EngineReported, EngineStateChanged, RestartHung
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import EngineProfile
from sagellm_protocol.engine import EngineStatus

BUSY = EngineStatus(engine_id="e", running=1, steps=7)


def joined() -> tuple[ControlState, float]:
    config = CoreConfig()
    state = ControlState(config, random.Random(1))
    state.on_event(EngineJoined(EngineProfile(engine_id="e", model="m")), 0.0)
    state.on_event(EngineStateChanged("e", "READY"), 0.0)
    state.on_event(EngineReported(BUSY), 0.0)
    return state, config.health.hung_s + 1.0


def test_work_without_steps_is_a_hang():
    """An engine that has work and whose progress counter stands still beyond the limit is restarted."""
    state, late = joined()
    commands = state.on_event(EngineReported(BUSY), late)
    assert [c.engine_id for c in commands if isinstance(c, RestartHung)] == ["e"]


def test_progress_idleness_and_loading_are_none():
    """Steps, no work, and a model that is being loaded again are not a hang."""
    for fine in (
        msgspec.structs.replace(BUSY, steps=8),
        msgspec.structs.replace(BUSY, running=0),
        msgspec.structs.replace(BUSY, running=0, waiting=3, phase="loading"),
    ):
        state, late = joined()
        assert not any(isinstance(c, RestartHung) for c in state.on_event(EngineReported(fine), late))
