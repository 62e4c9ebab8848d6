"""Engines of another process: a lifecycle driver that is told by a supervisor which engines run and where.

The supervisor and its workers talk over a socket pair in JSON lines. `EngineUp` and `EngineDown` come, `RestartWanted` and
`WorkerUp` go. A worker that has its engines says `Join`, is told what lasts, and at the end `Joined`. A worker's `Ask` is passed on to
all others; each says its `Answer`, and the asker gets them together.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from sagellm_control_plane.live.engine_log import EngineLog, log_path
from sagellm_control_plane.live.lifecycle import EngineExit, EngineSpec, LifecycleListener
from sagellm_control_plane.live.wire_client import WireEngineClient
from sagellm_protocol.errors import SageError, UnavailableError, UnsupportedError
from sagellm_protocol.ports import EngineClient

__all__ = [
    "LINE_BYTES",
    "Answer",
    "Answers",
    "Ask",
    "EngineDown",
    "EngineUp",
    "FollowerDriver",
    "FromWorker",
    "Join",
    "Joined",
    "RestartWanted",
    "ToWorker",
    "WorkerUp",
    "line",
]

LINE_BYTES = 1 << 24
"""The longest message: the metrics of all workers together."""

Duty = Callable[[str, Any], Any]

_FIXED = "with --workers engines are those of the command line; restart with others, or without --workers"


class EngineUp(msgspec.Struct, frozen=True, kw_only=True, tag="up"):
    """An engine answers at `address`."""

    engine_id: str
    address: str
    token: str
    pid: int


class EngineDown(msgspec.Struct, frozen=True, kw_only=True, tag="down"):
    """An engine has ended."""

    event: EngineExit


class RestartWanted(msgspec.Struct, frozen=True, kw_only=True, tag="restart"):
    """A worker sees that an engine makes no progress."""

    engine_id: str


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """A worker has its engines: it wants to know what lasts, and takes part from now on."""

    pid: int


class Joined(msgspec.Struct, frozen=True, kw_only=True, tag="joined"):
    """All that lasts has been said."""


class WorkerUp(msgspec.Struct, frozen=True, kw_only=True, tag="worker_up"):
    """A worker serves."""

    pid: int


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """Do the duty `what`. What is `lasting` is also said to workers that begin later; a new one takes an old one's place."""

    number: int
    what: str
    body: msgspec.Raw
    lasting: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """What came of an `Ask`; null where it could not be done."""

    number: int
    body: msgspec.Raw


class Answers(msgspec.Struct, frozen=True, kw_only=True, tag="answers"):
    """What the other workers said to an `Ask`."""

    number: int
    bodies: list[msgspec.Raw]


ToWorker = EngineUp | EngineDown | Joined | Ask | Answers
FromWorker = RestartWanted | Join | WorkerUp | Ask | Answer


_NULL = msgspec.Raw(b"null")


def line(message: ToWorker | FromWorker) -> bytes:
    """Return a message as one line."""
    return msgspec.json.encode(message) + b"\n"


class FollowerDriver:
    """A `LifecycleDriver` whose engines are started, watched and stopped by the supervisor.

    Args:
        control: the worker's end of the socket pair.
        log_dir: where the supervisor's driver keeps the engines' logs.
    """

    borrowed: ClassVar[bool] = True

    def __init__(self, control: socket.socket, log_dir: Path) -> None:
        self._control = control
        self._log_dir = log_dir
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._serving = False
        self._joined = asyncio.Event()
        self._up: dict[str, EngineUp] = {}
        self._waiting: dict[str, asyncio.Future[EngineUp]] = {}
        self._listeners: dict[str, LifecycleListener] = {}
        self._clients: dict[str, EngineClient] = {}
        self._duty: Duty | None = None
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[list[Any]]] = {}

    @property
    def name(self) -> str:
        """``follower``."""
        return "follower"

    async def open(self) -> None:
        """Be able to speak; before anything else."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._control, limit=LINE_BYTES)

    async def follow(self) -> None:
        """Take what the supervisor says until it ends."""
        assert self._reader is not None, "open comes first"
        decoder = msgspec.json.Decoder(ToWorker)
        while said := await self._reader.readline():
            match decoder.decode(said):
                case EngineUp() as up:
                    self._is_up(up)
                case EngineDown(event=event):
                    self._is_down(event)
                case Joined():
                    self._joined.set()
                case Ask() as ask:
                    self._send(Answer(number=ask.number, body=self._do(ask)))
                case Answers(number=number, bodies=bodies):
                    asked = self._asked.get(number)
                    if asked is not None and not asked.done():
                        asked.set_result([msgspec.json.decode(body) for body in bodies])
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result([])

    def on_duty(self, duty: Duty) -> None:
        """Call ``duty(what, body)`` for what other workers ask; it returns plain data and may raise `SageError`."""
        self._duty = duty

    def _do(self, ask: Ask) -> msgspec.Raw:
        if self._duty is None:
            return _NULL
        try:
            done = self._duty(ask.what, msgspec.json.decode(ask.body))
        except SageError:  # the asker has done it: here something is under way that makes it pointless
            return _NULL
        return msgspec.Raw(msgspec.json.encode(done))

    async def ask(self, what: str, body: Any, lasting: str = "") -> list[Any]:
        """Have every other worker do the duty `what`; return what they answered, without those that could not.

        Args:
            what: name of a duty.
            body: plain data.
            lasting: a name under which it is kept for workers that begin later; empty is not at all.
        """
        number = next(self._numbers)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        raw = msgspec.Raw(msgspec.json.encode(body))
        self._send(Ask(number=number, what=what, body=raw, lasting=lasting))
        try:
            return [answer for answer in await asked if answer is not None]
        finally:
            del self._asked[number]

    def _is_up(self, up: EngineUp) -> None:
        self._up[up.engine_id] = up
        waiting = self._waiting.pop(up.engine_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(up)
        elif up.engine_id in self._listeners:
            self._announce(up)

    def _is_down(self, event: EngineExit) -> None:
        self._up.pop(event.engine_id, None)
        if event.engine_id in self._listeners:
            self._listeners[event.engine_id].engine_exited(event)

    def _announce(self, up: EngineUp) -> EngineClient:
        client = WireEngineClient(up.engine_id, up.address, token=up.token)
        self._clients[up.engine_id] = client
        self._listeners[up.engine_id].engine_ready(up.engine_id, client, up.pid)
        return client

    async def start_engine(self, spec: EngineSpec, listener: LifecycleListener) -> EngineClient:
        """Wait until the supervisor has this engine up.

        Raises:
            UnavailableError: it has not within `spec.ready_timeout_s`.
            UnsupportedError: all engines are up, and this is none of them.
        """
        engine_id = spec.engine_id
        up = self._up.get(engine_id)
        if up is None and self._serving:
            raise UnsupportedError(f"engine {engine_id!r} cannot be started here: {_FIXED}", param="engine_id")
        if up is None:
            waiting = self._waiting.setdefault(engine_id, asyncio.get_running_loop().create_future())
            try:
                up = await asyncio.wait_for(waiting, spec.ready_timeout_s)
            except asyncio.TimeoutError:
                self._waiting.pop(engine_id, None)
                raise UnavailableError(f"engine {engine_id!r} was not up within {spec.ready_timeout_s:g} s") from None
        self._listeners[engine_id] = listener
        return self._announce(up)

    async def adopt(
        self, listener: LifecycleListener, found: Callable[[EngineSpec], Awaitable[None]]
    ) -> Sequence[EngineSpec]:
        """Nothing is left behind by a worker: the supervisor has the engines."""
        del listener, found
        return []

    def check_stop(self, engine_id: str) -> None:
        """Refuse: other workers use the engine too.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"engine {engine_id!r} belongs to the supervisor: {_FIXED}", param="engine_id")

    async def stop_engine(self, engine_id: str, *, grace_s: float = 10.0) -> None:
        """Let go of an engine. It goes on: the supervisor ends it."""
        del grace_s
        self._listeners.pop(engine_id, None)
        client = self._clients.pop(engine_id, None)
        if client is not None:
            await client.close()

    async def restart_engine(self, engine_id: str) -> None:
        """Ask the supervisor to end an engine that makes no progress; it comes back by its restart policy."""
        self._send(RestartWanted(engine_id=engine_id))

    async def join(self, pid: int) -> None:
        """Take part in what workers tell each other; what lasts has been done when this returns."""
        self._send(Join(pid=pid))
        await self._joined.wait()

    def serving(self, pid: int) -> None:
        """Tell the supervisor that this worker serves."""
        self._serving = True
        self._send(WorkerUp(pid=pid))

    def _send(self, message: FromWorker) -> None:
        if self._writer is not None:
            self._writer.write(line(message))

    def logs(self, engine_id: str, *, lines: int = 200) -> Sequence[str]:
        """Return the last lines that the engine wrote."""
        return EngineLog(log_path(self._log_dir, engine_id), 0).tail(lines)

    async def close(self) -> None:
        """Let go of all engines."""
        for engine_id in list(self._clients):
            await self.stop_engine(engine_id, grace_s=0.0)
        if self._writer is not None:
            self._writer.close()
