"""The client's end of one connection to an engine process: frames in, deltas to their sinks."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any, cast

import msgspec

from sagellm_control_plane.live.runs import DeltaSink
from sagellm_protocol import wire
from sagellm_protocol.engine import EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import EngineDiedError, InternalError, SageError

__all__ = ["WireConnection"]

_log = logging.getLogger(__name__)


class _Stream:
    """One sequence of a connection, and whom its deltas go to. It lets go of its sink at the end: sinks hold their runs."""

    __slots__ = ("_connection", "_sink", "number")

    def __init__(self, connection: WireConnection, number: int, sink: DeltaSink) -> None:
        self._connection = connection
        self._sink: DeltaSink | None = sink
        self.number = number

    def delta(self, delta: TokenDelta) -> None:
        """The engine sent a delta."""
        sink = self._sink
        if sink is None:
            return
        if delta.finish_reason is not None:
            self._leave()
        try:
            sink.delta(delta)
        except Exception:  # noqa: BLE001  the sink's bug is its own: the other streams of the connection go on
            _log.exception("stream %d: its reader failed", self.number)
            self.cancel()
            sink.ended(InternalError("the reader of an engine's tokens failed unexpectedly"))

    def fail(self, error: SageError) -> None:
        """The stream ends with `error`."""
        sink = self._sink
        self._leave()
        if sink is not None:
            sink.ended(error)

    def cancel(self) -> None:
        """Have no more of it: the engine aborts, unless it has finished."""
        if self._leave():
            self._connection.send(wire.Abort(stream=self.number))

    def _leave(self) -> bool:
        self._sink = None
        return self._connection.forget(self)


class WireConnection(asyncio.Protocol):
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
                    if stream is not None:
                        stream.delta(delta)
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

    # what the engine is told

    def send(self, message: wire.ToEngine) -> None:
        """Send one message; nothing if the connection has ended."""
        if self._transport is not None and self.lost is None:
            self._transport.write(wire.encode_frame(message))

    @property
    def ready(self) -> bool:
        """Whether a sequence can be submitted at once."""
        return self.lost is None and self._can_write.is_set()

    async def writable(self) -> None:
        """Wait until the engine has taken what was sent before."""
        await self._can_write.wait()

    def submit(self, request: EngineRequest, sink: DeltaSink) -> _Stream:
        """Start a sequence.

        Raises:
            EngineDiedError: the connection has ended.
            InvalidArgumentError: the request is too large for a frame.
        """
        if self.lost is not None:
            raise EngineDiedError(self.lost.message)
        stream = _Stream(self, next(self._numbers), sink)
        self.send(wire.Submit(stream=stream.number, request=request))
        self._streams[stream.number] = stream
        return stream

    def forget(self, stream: _Stream) -> bool:
        """Take no more for a stream; False if it had ended."""
        return self._streams.pop(stream.number, None) is not None

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
        for stream in list(self._streams.values()):
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
