"""An engine in another process, as an `EngineClient`: one connection carries all requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from sagellm_control_plane.live.runs import DeltaSink, Run, StreamRun, pulled
from sagellm_control_plane.live.wire_connection import WireConnection
from sagellm_protocol import wire
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.handover import KVExportRequest, KVImported, KVTicket
from sagellm_protocol.prefix import BlockEvent, BlockSnapshot

__all__ = ["WireEngineClient", "WireTimeouts"]


class WireTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait, in seconds.

    Attributes:
        connect: for the connection and the engine's welcome.
        call: for the answer to a call.
        silence: without any frame, heartbeats included, after which the engine counts as dead.
    """

    connect: float = 10.0
    call: float = 10.0
    silence: float = 15.0


class WireEngineClient:
    """Talks to ``python -m sagellm_core.server``. Belongs to one event loop.

    Connects on first use, and again on the next use after the connection broke; streams that were open then end with
    `EngineDiedError`.

    Args:
        engine_id: the engine's name; another engine at the address is refused. Empty takes whoever is there.
        address: path of a Unix socket, ``unix:///path`` or ``tcp://host:port``.
        token: for TCP.
        timeouts: how long to wait.
        max_buffered_tokens: tokens that one stream may hold for a consumer that does not read; above that the stream is aborted with
            `ResourceExhaustedError`, and the others go on.
    """

    def __init__(
        self,
        engine_id: str,
        address: str,
        *,
        token: str = "",
        timeouts: WireTimeouts | None = None,
        max_buffered_tokens: int = 65_536,
    ) -> None:
        self._engine_id = engine_id
        self._address = address
        self._token = token
        self._timeouts = timeouts or WireTimeouts()
        self._max_buffered = max_buffered_tokens
        self._connection: WireConnection | None = None
        self._connecting = asyncio.Lock()
        self._closed = False

    @property
    def engine_id(self) -> str:
        """The engine's name."""
        return self._engine_id

    @property
    def last_status(self) -> EngineStatus | None:
        """What the last heartbeat said; None before the first."""
        return self._connection.last_status if self._connection is not None else None

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._connection is not None and self._connection.lost is None

    async def connect(self) -> EngineDescription:
        """Connect now and return what the engine serves.

        Raises:
            UnavailableError: nothing answers at the address.
            UnauthenticatedError: the token is wrong.
            ProtocolVersionError: the engine speaks another version.
            InvalidArgumentError: another engine answers.
        """
        return (await self._ensure()).welcome.description

    async def describe(self) -> EngineDescription:
        """Return what the engine serves, as its welcome said."""
        return await self.connect()

    async def status(self) -> EngineStatus:
        """Ask the engine what it is doing now."""
        status: EngineStatus = await self._call("status", wire.NoParams(), self._timeouts.call)
        return status

    async def abort(self, request_id: str) -> bool:
        """Abort a sequence by id, whoever submitted it."""
        found: bool = await self._call("abort", wire.AbortParams(request_id=request_id), self._timeouts.call)
        return found

    async def drain(self, timeout_s: float) -> None:
        """Ask the engine to refuse new sequences, finish those it has within `timeout_s` seconds, and end."""
        await self._call("drain", wire.DrainParams(timeout_s=timeout_s), self._timeouts.call)

    async def block_events(self, after: int) -> tuple[BlockEvent, ...]:
        """Return the changes of the engine's prefix cache that follow number `after`.

        Raises:
            UnsupportedError: the engine does not report them.
        """
        events: tuple[BlockEvent, ...] = await self._call(
            "block_events", wire.BlockEventsParams(after=after), self._timeouts.call
        )
        return events

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one sequence; tokens that wait for the consumer come merged. Closing the generator aborts the sequence."""
        connection = await self._ensure()
        await connection.writable()
        async with aclosing(pulled(connection.submit, request, limit=self._max_buffered)) as deltas:
            async for delta in deltas:
                yield delta

    def push(self, request: EngineRequest, sink: DeltaSink) -> Run:
        """Run one sequence and tell `sink` where the bytes arrive (see `live.runs.PushingClient`)."""
        connection = self._connection
        if self._closed or connection is None or not connection.ready:
            return StreamRun(self.stream(request), sink)  # which connects, or waits until the engine reads
        try:
            return connection.submit(request, sink)
        except InvalidArgumentError as error:
            sink.ended(error)
            return _Refused()

    async def block_snapshot(self) -> BlockSnapshot:
        """Return all that the engine's prefix cache holds."""
        snapshot: BlockSnapshot = await self._call("block_snapshot", wire.NoParams(), self._timeouts.call)
        return snapshot

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Compute vectors; cancelling the task tells the engine to stop.

        Raises:
            UnsupportedError: the engine computes none.
            DeadlineExceededError: `request.deadline_s` passed.
        """
        result: EmbedResult = await self._call("embed", request, request.deadline_s)
        return result

    async def export_kv(self, request: KVExportRequest) -> KVTicket:
        """Lay the cached blocks of a prompt's beginning ready for another engine of this machine."""
        ticket: KVTicket = await self._call("export_kv", request, self._timeouts.call)
        return ticket

    async def import_kv(self, ticket: KVTicket) -> KVImported:
        """Take blocks that another engine laid ready."""
        imported: KVImported = await self._call("import_kv", ticket, self._timeouts.call)
        return imported

    async def discard_kv(self, name: str) -> bool:
        """Remove blocks of a ticket that nobody will import."""
        removed: bool = await self._call("discard_kv", wire.DiscardKVParams(name=name), self._timeouts.call)
        return removed

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter from `path` on the engine's machine; requests then ask for it by `name`."""
        await self._call("load_adapter", wire.LoadAdapterParams(name=name, path=path), None)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        await self._call("unload_adapter", wire.UnloadAdapterParams(name=name), self._timeouts.call)

    async def close(self) -> None:
        """End the connection; open streams end with `EngineDiedError`, and the engine aborts them. Idempotent."""
        self._closed = True
        if self._connection is not None:
            self._connection.leave()

    async def _call(self, method: str, params: msgspec.Struct, timeout_s: float | None) -> Any:
        connection = await self._ensure()
        if method not in connection.welcome.methods:
            raise UnsupportedError(f"engine {self._engine_id!r} does not offer {method!r}", param="method")
        try:
            return await asyncio.wait_for(connection.call(method, params), timeout_s)
        except asyncio.TimeoutError:
            raise DeadlineExceededError(
                f"engine {self._engine_id!r} did not answer {method!r} within {timeout_s:g} s"
            ) from None

    async def _ensure(self) -> WireConnection:
        if self._closed:
            raise UnavailableError(f"the client of engine {self._engine_id!r} is closed")
        if self._connection is None or self._connection.lost is not None:
            async with self._connecting:
                if self._connection is None or self._connection.lost is not None:
                    self._connection = await self._open()
        return self._connection

    async def _open(self) -> WireConnection:
        loop = asyncio.get_running_loop()
        connection = WireConnection(loop, self._engine_id, self._timeouts.silence)
        factory: Callable[[], WireConnection] = lambda: connection  # noqa: E731 (both calls below want a factory)
        kind, host, port = _parse(self._address)
        try:
            if kind == "unix":
                opening: Any = loop.create_unix_connection(factory, host)
            else:
                opening = loop.create_connection(factory, host, port)
            await asyncio.wait_for(opening, self._timeouts.connect)
        except (OSError, asyncio.TimeoutError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else "no answer"
            raise UnavailableError(f"engine {self._engine_id!r} cannot be reached: {reason}") from None
        try:
            connection.send(wire.Hello(token=self._token, engine_id=self._engine_id))
            await asyncio.wait_for(asyncio.shield(connection.welcomed), self._timeouts.connect)
        except asyncio.TimeoutError:
            connection.drop(f"engine {self._engine_id!r} did not say welcome within {self._timeouts.connect:g} s")
            raise UnavailableError(
                f"engine {self._engine_id!r} did not say welcome within {self._timeouts.connect:g} s"
            ) from None
        except BaseException:
            connection.drop("connecting was given up")
            raise
        if not self._engine_id:
            self._engine_id = connection.welcome.description.engine_id
        return connection


def _parse(address: str) -> tuple[str, str, int]:
    if address.startswith("tcp://"):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit():
            raise InvalidArgumentError(f"address is {address!r}: give tcp://HOST:PORT", param="address")
        return "tcp", host.strip("[]"), int(port)
    return "unix", address.removeprefix("unix://"), 0


class _Refused:
    """A run that never began."""

    def cancel(self) -> None:
        """There is nothing to abort."""
