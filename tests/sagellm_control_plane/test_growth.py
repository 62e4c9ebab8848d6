"""Days of traffic and of engines that come and go leave nothing behind."""

from __future__ import annotations

import gc
import random
import types
from itertools import count

from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import (
    AttemptFailed,
    AttemptFinished,
    Dispatch,
    EngineDied,
    EngineJoined,
    EngineLeft,
    EngineReported,
    EngineStateChanged,
    FirstToken,
    RequestArrived,
    RequestCancelled,
    Tick,
)
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import EngineProfile, RequestView
from sagellm_protocol.engine import EngineStatus
from sagellm_protocol.errors import EngineDiedError


def reachable(root: object) -> int:
    """Number of objects that `root` keeps alive, code apart."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType | types.CodeType):
            continue
        seen.add(id(one))
        todo.extend(gc.get_referents(one))
    return len(seen)


class Traffic:
    """Engines with ever new names, and requests that end in every way."""

    def __init__(self) -> None:
        self.state = ControlState(CoreConfig(), random.Random(1))
        self.rng = random.Random(2)
        self.names = count()
        self.now = 0.0

    def feed(self, event: object) -> list:
        self.now += 0.01
        return self.state.on_event(event, self.now)

    def day(self) -> None:
        """Two engines come, serve thirty requests, and go; one of them dies."""
        engines = [f"e{next(self.names)}" for _ in range(2)]
        for engine in engines:
            self.feed(EngineJoined(EngineProfile(engine_id=engine, model="m", n_blocks=64)))
            self.feed(EngineStateChanged(engine, "READY", True))
        for number in range(30):
            self.request(number)
        self.feed(EngineReported(EngineStatus(engine_id=engines[0], running=3, waiting=1)))
        self.feed(EngineDied(engines[0]))
        self.feed(Tick())
        for engine in engines:
            self.feed(EngineLeft(engine))
        self.feed(Tick())

    def request(self, number: int) -> None:
        name = f"r{next(self.names)}"
        blocks = tuple(self.rng.randbytes(16) for _ in range(4))
        view = RequestView(
            request_id=name, model="m", prompt_tokens=64, blocks=blocks, block_tokens=16, tenant=f"t{number % 7}",
            session=name, arrived_at=self.now,
        )  # fmt: skip
        (sent,) = (command for command in self.feed(RequestArrived(view)) if isinstance(command, Dispatch))
        if number % 3 == 0:
            error = EngineDiedError("it ended").to_wire()
            commands = self.feed(AttemptFailed(name, sent.attempt, error))
            self.feed(EngineStateChanged(sent.engine_id, "READY"))
            again = [command for command in commands if isinstance(command, Dispatch)]
            sent = again[0] if again else sent
        if number % 4 == 0:
            self.feed(RequestCancelled(name))
            return
        self.feed(FirstToken(name, sent.attempt))
        self.feed(AttemptFinished(name, sent.attempt, 8))


def test_what_the_core_knows_does_not_grow_with_time():
    """After three times as many engines and requests, each with a name of its own, the core holds no more than before."""
    traffic = Traffic()
    for _ in range(50):
        traffic.day()
    before = reachable(traffic.state)
    for _ in range(100):
        traffic.day()
    assert traffic.state.ledger.open == 0
    assert reachable(traffic.state) <= before * 1.02
