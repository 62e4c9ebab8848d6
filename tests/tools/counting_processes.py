"""Counting engines as processes of a driver, and a listener to what becomes of them."""

from __future__ import annotations

import asyncio
import sys

import msgspec
from counting import COUNTING, request

from sagellm_control_plane.live.lifecycle import EngineExit, EngineSpec, RestartPolicy
from sagellm_control_plane.live.processes import identity
from sagellm_protocol.ports import EngineClient

FAST = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05, max_attempts=3)


def argv(spec: EngineSpec, socket: str) -> list[str]:
    """The command of a counting engine."""
    config = msgspec.json.encode(dict(spec.config) | {"engine_id": spec.engine_id}).decode()
    where = ["--tcp", socket.removeprefix("tcp://")] if socket.startswith("tcp://") else ["--socket", socket]
    return [sys.executable, str(COUNTING), "--config", config, *where, "--heartbeat", "0.2"]


def spec(engine_id: str = "e", **config: object) -> EngineSpec:
    """A counting engine that is started again quickly."""
    return EngineSpec(engine_id=engine_id, model_id="count", config=config, ready_timeout_s=30, restart=FAST)


async def tokens(client: EngineClient, **kwargs: int) -> list[int]:
    """The tokens of one request."""
    return [t async for delta in client.stream(request(**kwargs)) for t in delta.token_ids]


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ready: asyncio.Queue[tuple[str, EngineClient, int]] = asyncio.Queue()
        self.exits: asyncio.Queue[EngineExit] = asyncio.Queue()

    def engine_ready(self, engine_id: str, client: EngineClient, pid: int) -> None:
        """Keep an announcement."""
        self.ready.put_nowait((engine_id, client, pid))

    def engine_exited(self, event: EngineExit) -> None:
        """Keep an exit."""
        self.exits.put_nowait(event)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to look does not."""
    return identity(pid) != ""
