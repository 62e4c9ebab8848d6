"""One client's connection to an engine process."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from sagellm_core.frame_writer import FrameWriter
from sagellm_protocol import wire
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import (
    EngineDiedError,
    InternalError,
    InvalidArgumentError,
    ProtocolVersionError,
    SageError,
    UnauthenticatedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from sagellm_core.server import EngineServer

__all__ = ["Connection"]

_log = logging.getLogger(__name__)

MAX_OUTBOUND_BYTES = 64 * 2**20
"""A client that lets this much pile up does not read; it is cut off and its sequences are aborted."""

HELLO_TIMEOUT_S = 10.0


class Connection(asyncio.Protocol):
    """Sequences belong to the connection that submitted them: when it drops they are aborted.

    The tokens of one step leave in one frame. An engine with `submit` hands them over on its own thread, and they are written there;
    of any other engine each stream is pulled by a task, and what comes within one turn of the event loop shares a frame.
    """

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self._decoder = wire.FrameDecoder(wire.HELLO_BYTES)
        self._transport: asyncio.Transport | None = None
        self._welcomed = False
        self._ending = False
        self._writer: FrameWriter | None = None
        self._aborts: dict[int, Callable[[], None]] = {}
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._by_request: dict[str, asyncio.Task[None]] = {}
        self._aborted: set[asyncio.Task[None]] = set()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._outbound: list[tuple[int, TokenDelta]] = []
        self._flush_planned = False
        self._hello_timer = server.loop.call_later(HELLO_TIMEOUT_S, self._no_hello)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected; it has to say hello next."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not subclasses
        fileno = transport.get_extra_info("socket").fileno()
        self._writer = FrameWriter(self._server.loop, fileno, MAX_OUTBOUND_BYTES, self._too_slow)
        self._server.connections.add(self)
        self._server.connections_changed()

    def data_received(self, data: bytes) -> None:
        """Take what came; the first bad frame ends the connection."""
        try:
            for payload in self._decoder.feed(data):
                self._handle(wire.decode_to_engine(payload))
        except SageError as exc:
            self.fail(exc)

    def connection_lost(self, _exc: Exception | None) -> None:
        """The client has gone: abort all that it submitted."""
        self._hello_timer.cancel()
        self._transport = None
        if self._writer is not None:
            self._writer.close()
        self._server.connections.discard(self)
        self._server.connections_changed()
        self._abort_submitted()
        for task in [*self._streams.values(), *self._calls.values()]:
            task.cancel()

    # what the client says

    def _handle(self, message: wire.ToEngine) -> None:
        if self._ending or self._transport is None or self._transport.is_closing():
            return
        if not self._welcomed:
            self._greet(message)
            return
        match message:
            case wire.Submit(stream=stream, request=request):
                self._submit(stream, request)
            case wire.Abort(stream=stream):
                self._abort(stream)
            case wire.Call():
                self._call(message)
            case wire.Cancel(call_id=call_id):
                self._cancel(call_id)
            case wire.Goodbye():
                self._close()
            case wire.Hello():
                raise InvalidArgumentError("hello came twice on one connection")

    def _greet(self, message: wire.ToEngine) -> None:
        if not isinstance(message, wire.Hello):
            raise UnauthenticatedError("the first message must be hello")
        if message.version != wire.WIRE_VERSION:
            raise ProtocolVersionError(
                f"client speaks wire version {message.version}, this engine speaks {wire.WIRE_VERSION}: upgrade the older side"
            )
        expected = self._server.token
        if expected is not None and not hmac.compare_digest(expected.encode(), message.token.encode()):
            raise UnauthenticatedError("the engine's token is wrong or missing")
        own_id = self._server.description.engine_id
        if message.engine_id not in ("", own_id):
            raise InvalidArgumentError(f"this is engine {own_id!r}, not {message.engine_id!r}", param="engine_id")
        self._hello_timer.cancel()
        self._welcomed = True
        self._decoder.limit = wire.MAX_FRAME_BYTES
        self.send(self._server.welcome())

    def _no_hello(self) -> None:
        self.fail(UnauthenticatedError(f"no hello within {HELLO_TIMEOUT_S:g} s"))

    def _submit(self, stream: int, request: EngineRequest) -> None:
        if stream in self._streams or stream in self._aborts:
            raise InvalidArgumentError(f"stream number {stream} came twice on one connection", param="stream")
        if self._server.draining:
            error = UnavailableError("engine is draining: send the request to another one")
            self.send(wire.Failure(error=error.to_wire(), stream=stream))
            return
        self._server.sequence_started()
        if self._server.submit is not None:
            self._aborts[stream] = self._server.submit(request, self, stream)
            return
        earlier = self._by_request.get(request.request_id)
        task = self._server.loop.create_task(self._run(stream, request, earlier))
        self._streams[stream] = task
        self._by_request[request.request_id] = task
        task.add_done_callback(lambda done: self._ended(stream, request.request_id, done))

    def _abort(self, stream: int) -> None:
        abort = self._aborts.get(stream)
        if abort is not None:
            abort()
            self._forget([stream])
        task = self._streams.get(stream)
        if task is not None:
            task.cancel()
            self._aborted.add(task)

    # what an engine with `submit` says, on its thread

    def gained(self, deltas: list[tuple[int, TokenDelta]]) -> bool:
        """Write what sequences gained; False when the client has gone."""
        if self._writer is None or self._writer.closed:
            return False
        self._writer.send(_frames(deltas))
        finished = [number for number, delta in deltas if delta.finish_reason is not None]
        if finished:
            self._server.loop.call_soon_threadsafe(self._forget, finished)
        return True

    def ended(self, key: int, error: SageError) -> None:
        """Tell the client that the engine ended under its sequence."""
        self._server.loop.call_soon_threadsafe(self._failed, key, error)

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            if self._aborts.pop(number, None) is not None:
                self._server.sequence_ended()

    def _failed(self, number: int, error: SageError) -> None:
        if number not in self._aborts:
            return
        self._forget([number])
        self.send(wire.Failure(error=error.to_wire(), stream=number))
        if isinstance(error, EngineDiedError):
            self._server.engine_died(error)

    def _abort_submitted(self) -> None:
        for number, abort in list(self._aborts.items()):
            abort()
            self._forget([number])

    # the same of an engine without it

    async def _run(self, stream: int, request: EngineRequest, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None and earlier in self._aborted:
            await asyncio.wait([earlier])  # the engine still lets go of an aborted sequence of the same id
        async with aclosing(self._server.engine.stream(request)) as deltas:
            async for delta in deltas:
                self._outbound.append((stream, delta))
                if not self._flush_planned:
                    self._flush_planned = True
                    self._server.loop.call_soon(self._flush)

    def _ended(self, stream: int, request_id: str, task: asyncio.Task[None]) -> None:
        del self._streams[stream]
        self._aborted.discard(task)
        if self._by_request.get(request_id) is task:
            del self._by_request[request_id]
        self._server.sequence_ended()
        if task.cancelled():
            return
        exc = task.exception()
        if exc is None:
            return
        self._flush()
        self.send(wire.Failure(error=_as_error(exc).to_wire(), stream=stream))
        if isinstance(exc, EngineDiedError):
            self._server.engine_died(exc)

    def _call(self, message: wire.Call) -> None:
        call_id = message.call_id
        if call_id in self._calls:
            raise InvalidArgumentError(f"call number {call_id} came twice on one connection", param="call_id")
        task = self._server.loop.create_task(self._answer(message))
        self._calls[call_id] = task
        is_work = message.method == "embed"
        if is_work:
            self._server.sequence_started()

        def ended(done: asyncio.Task[None]) -> None:
            del self._calls[call_id]
            if is_work:
                self._server.sequence_ended()
            exc = None if done.cancelled() else done.exception()
            if exc is not None:
                self.send(wire.Reply(call_id=call_id, error=_as_error(exc).to_wire()))

        task.add_done_callback(ended)

    def _cancel(self, call_id: int) -> None:
        task = self._calls.get(call_id)
        if task is not None:
            task.cancel()

    async def _answer(self, message: wire.Call) -> None:
        result = await self._server.invoke(message.method, wire.decode_params(message))
        self.send(wire.reply(message.call_id, result))

    # what the client is told

    def _flush(self) -> None:
        self._flush_planned = False
        if self._outbound:
            deltas, self._outbound = self._outbound, []
            self.send_frame(_frames(deltas))

    def send(self, message: wire.FromEngine) -> None:
        """Send one message; nothing if the client has gone."""
        self.send_frame(wire.encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """Send a frame that is encoded already (a broadcast)."""
        if self._writer is not None and self._transport is not None and not self._transport.is_closing():
            self._writer.send(frame)

    def beat(self, frame: bytes) -> None:
        """Send a heartbeat, unless the client lags so far that it would not see it in time anyway."""
        if self._welcomed and self._writer is not None and not self._writer.backlog:
            self.send_frame(frame)

    def _too_slow(self) -> None:
        _log.warning("client does not read its tokens: connection cut")
        if self._transport is not None:
            self._transport.abort()

    def _close(self) -> None:
        """End the connection once all is written; what the client still says does not matter."""
        self._ending = True
        if self._transport is not None and self._writer is not None:
            self._writer.when_drained(self._transport.close)

    def fail(self, error: SageError) -> None:
        """Tell the client why, and end the connection."""
        _log.warning("connection refused: %s", error.message)
        self.send(wire.Failure(error=error.to_wire()))
        self._close()

    def end(self, reason: str) -> None:
        """Say goodbye."""
        self._flush()
        if self._welcomed:
            self.send(wire.Goodbye(reason=reason))
        self._close()

    def abort_all(self) -> list[asyncio.Task[None]]:
        """Abort every sequence of this connection with a retryable error; return the tasks to wait for."""
        tasks = []
        error = UnavailableError("engine was stopped before the request finished: send it to another one")
        for stream in [*self._streams, *self._aborts]:
            self.send(wire.Failure(error=error.to_wire(), stream=stream))
        self._abort_submitted()
        for task in self._streams.values():
            task.cancel()
            tasks.append(task)
        return tasks


def _frames(deltas: list[tuple[int, TokenDelta]]) -> bytes:
    """Return the deltas in one frame; in one for each if they are too large together. One that no frame holds is a failure."""
    try:
        return wire.encode_frame(wire.Deltas(deltas=tuple(deltas)))
    except InvalidArgumentError as error:
        if len(deltas) == 1:
            return wire.encode_frame(wire.Failure(error=error.to_wire(), stream=deltas[0][0]))
    return b"".join(_frames([delta]) for delta in deltas)


def _as_error(exc: BaseException) -> SageError:
    if isinstance(exc, SageError):
        return exc
    _log.error("a sequence failed by a bug", exc_info=exc)
    return InternalError(f"the engine failed on this request ({type(exc).__name__}): see its log")
