"""An engine in another process, as an `EngineClient`: one connection carries all requests."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import msgspec

from sagellm_protocol import wire
from sagellm_protocol.deltas import join_deltas
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import (
    DeadlineExceededError,
    EngineDiedError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SageError,
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
        self._connection: _Connection | None = None
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
        stream = connection.submit(request, self._max_buffered)
        try:
            while True:
                delta = await stream.next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            connection.release(stream)

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

    async def _ensure(self) -> _Connection:
        if self._closed:
            raise UnavailableError(f"the client of engine {self._engine_id!r} is closed")
        if self._connection is None or self._connection.lost is not None:
            async with self._connecting:
                if self._connection is None or self._connection.lost is not None:
                    self._connection = await self._open()
        return self._connection

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        connection = _Connection(loop, self._engine_id, self._timeouts.silence)
        factory: Callable[[], _Connection] = lambda: connection  # noqa: E731 (both calls below want a factory)
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


class _Stream:
    """One sequence's deltas on their way from the connection to the consumer."""

    def __init__(self, number: int, request_id: str, limit: int) -> None:
        self.number = number
        self.request_id = request_id
        self.finished = False
        self._limit = limit
        self._waiting: deque[TokenDelta] = deque()
        self._tokens = 0
        self._error: SageError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> bool:
        """Take a delta; False when the consumer lags beyond the limit."""
        self._waiting.append(delta)
        self._tokens += len(delta.token_ids)
        self.finished = delta.finish_reason is not None
        self._wake()
        return self._tokens <= self._limit

    def fail(self, error: SageError) -> None:
        """End the stream with `error`, after what came before it."""
        self.finished = True
        self._error = self._error or error
        self._wake()

    async def next(self) -> TokenDelta:
        """Return all that waits, as one delta."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._tokens = 0
        joined = join_deltas(self._waiting)
        self._waiting.clear()
        return joined

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """The client's end of one connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine_id: str, silence_s: float) -> None:
        self._loop = loop
        self._engine_id = engine_id
        self._silence_s = silence_s
        self._decoder = wire.FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, _Stream] = {}
        self._calls: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._numbers = itertools.count(1)
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._last_frame = loop.time()
        self._watch: asyncio.TimerHandle | None = None
        self._reason: SageError | None = None
        self.welcomed: asyncio.Future[wire.Welcome] = loop.create_future()
        self.last_status: EngineStatus | None = None
        self.lost: SageError | None = None

    @property
    def welcome(self) -> wire.Welcome:
        """What the engine said first."""
        return self.welcomed.result()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not subclasses
        self._watch_silence()

    def data_received(self, data: bytes) -> None:
        """Take what came; a frame that cannot be read ends the connection."""
        self._last_frame = self._loop.time()
        try:
            for payload in self._decoder.feed(data):
                self._handle(wire.decode_from_engine(payload))
        except SageError as exc:
            self.drop(f"engine {self._engine_id!r} cannot be understood: {exc.message}")

    def pause_writing(self) -> None:
        """The engine reads slowly: submit no more for now."""
        self._can_write.clear()

    def resume_writing(self) -> None:
        """The engine has caught up."""
        self._can_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection broke: every open stream and call ends."""
        if self._watch is not None:
            self._watch.cancel()
        detail = f": {exc}" if exc is not None else ""
        self._end(self._reason or EngineDiedError(f"the connection to engine {self._engine_id!r} broke{detail}"))

    # what the engine says

    def _handle(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Deltas(deltas=deltas):
                for number, delta in deltas:
                    stream = self._streams.get(number)
                    if stream is not None and not stream.push(delta):
                        self._overflow(stream)
            case wire.Heartbeat(status=status):
                self.last_status = status
            case wire.Reply():
                self._answered(message)
            case wire.Failure(error=error, stream=number):
                self._failed(SageError.from_wire(error), number)
            case wire.Welcome():
                if not self.welcomed.done():
                    self.welcomed.set_result(message)
            case wire.Goodbye(reason=reason):
                self._reason = EngineDiedError(f"engine {self._engine_id!r} ended: {reason}")

    def _answered(self, message: wire.Reply) -> None:
        method, future = self._calls.pop(message.call_id, ("", None))
        if future is None or future.done():
            return
        if message.error is not None:
            future.set_exception(SageError.from_wire(message.error))
            return
        try:
            future.set_result(wire.decode_result(method, message))
        except SageError as exc:
            future.set_exception(exc)

    def _failed(self, error: SageError, number: int | None) -> None:
        if number is None:
            self._reason = error
            self._end(error)
        elif number in self._streams:
            self._streams[number].fail(error)

    def _overflow(self, stream: _Stream) -> None:
        stream.fail(
            ResourceExhaustedError(
                f"request {stream.request_id!r} is not read and its buffer is full: aborted; read faster"
            )
        )
        self._streams.pop(stream.number, None)
        self.send(wire.Abort(stream=stream.number))

    # what the engine is told

    def send(self, message: wire.ToEngine) -> None:
        """Send one message; nothing if the connection has ended."""
        if self._transport is not None and self.lost is None:
            self._transport.write(wire.encode_frame(message))

    async def writable(self) -> None:
        """Wait until the engine has taken what was sent before."""
        await self._can_write.wait()

    def submit(self, request: EngineRequest, limit: int) -> _Stream:
        """Start a sequence."""
        if self.lost is not None:
            raise EngineDiedError(self.lost.message)
        stream = _Stream(next(self._numbers), request.request_id, limit)
        self.send(wire.Submit(stream=stream.number, request=request))
        self._streams[stream.number] = stream
        return stream

    def release(self, stream: _Stream) -> None:
        """Forget a stream, and abort it if it has not finished."""
        if self._streams.pop(stream.number, None) is not None and not stream.finished:
            self.send(wire.Abort(stream=stream.number))

    async def call(self, method: str, params: msgspec.Struct) -> Any:
        """Ask, and wait for the answer."""
        if self.lost is not None:
            raise EngineDiedError(self.lost.message)
        call_id = next(self._numbers)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[call_id] = (method, future)
        try:
            self.send(wire.call(call_id, method, params))
            return await future
        finally:
            if self._calls.pop(call_id, None) is not None and (future.cancelled() or not future.done()):
                self.send(wire.Cancel(call_id=call_id))

    def leave(self) -> None:
        """Say goodbye and end."""
        self.send(wire.Goodbye(reason="the client is closing"))
        self._reason = EngineDiedError(f"the client of engine {self._engine_id!r} was closed")
        if self._transport is not None:
            self._transport.close()
        self._end(self._reason)

    def drop(self, reason: str) -> None:
        """Give the connection up."""
        self._reason = self._reason or EngineDiedError(reason)
        if self._transport is not None:
            self._transport.abort()
        self._end(self._reason)

    def _end(self, error: SageError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._can_write.set()
        if not self.welcomed.done():
            self.welcomed.set_exception(error)
            self.welcomed.exception()  # seen: nobody may be waiting any more
        for stream in self._streams.values():
            if not stream.finished:
                stream.fail(EngineDiedError(error.message))
        for _, future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDiedError(error.message))

    def _watch_silence(self) -> None:
        """Drop an engine that has been silent for too long. A late timer is our own loop's delay, not the engine's silence."""
        interval = self._silence_s / 4
        due = self._loop.time() + interval

        def check() -> None:
            now = self._loop.time()
            if now - due > interval:
                self._last_frame = now
            if now - self._last_frame > self._silence_s:
                self.drop(f"engine {self._engine_id!r} was silent for {self._silence_s:g} s")
                return
            self._watch_silence()

        self._watch = self._loop.call_at(due, check)
