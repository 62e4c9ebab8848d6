"""Events of a request -> frames on a socket.

The request's own task turns events into frames as they come, and writes all that have gathered, in one write, whenever it would
have to wait for the next event. A write costs some twenty microseconds and a frame a fraction of one. When a reader does not keep up a task of
its own waits for it, so that it holds back nobody but itself: beyond a bound its request is aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator
from typing import Any, Protocol

from sagellm_gateway.context import Call
from sagellm_gateway.guard import ClientGoneError, Guard
from sagellm_protocol.errors import InternalError, SageError
from sagellm_protocol.generation import ChoiceDelta, GenerationEnd, GenerationStart

__all__ = ["Frames", "guarded", "stream"]

log = logging.getLogger("sagellm_gateway")

_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class Frames(Protocol):
    """How one dialect writes one stream. Each method returns the bytes to send, possibly none."""

    content_type: bytes
    ping: bytes

    def start(self, event: GenerationStart) -> bytes:
        """The prompt was accepted."""
        ...

    def delta(self, event: ChoiceDelta) -> bytes:
        """A choice gained something."""
        ...

    def end(self, event: GenerationEnd) -> bytes:
        """All choices have finished."""
        ...

    def error(self, error: SageError) -> bytes:
        """The stream breaks off."""
        ...


class _Stream:
    """Takes the events of one request and writes their frames, in one task as long as the reader keeps up."""

    def __init__(self, call: Call, events: AsyncGenerator[Any, None], frames: Frames, guard: Guard) -> None:
        self.call = call
        self.events = events
        self.frames = frames
        self.guard = guard
        self.pending: list[bytes] = []
        self.loop = asyncio.get_running_loop()
        self.last_write = self.loop.time()
        self.writer: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Write everything, the end included."""
        try:
            await self._take_all()
            tail = b""
        except SageError as error:
            if not (self.call.started or self.pending):
                raise
            self.call.scope["sagellm.outcome"] = error.code.value
            tail = self.frames.error(error)
        await self.finish(tail)

    async def _take_all(self) -> None:
        frames = self.frames
        start, delta, end = frames.start, frames.delta, frames.end
        try:
            while True:
                event = await until_it_waits(anext(self.events), self.flush)
                kind = type(event)
                self._gather(
                    delta(event) if kind is ChoiceDelta else start(event) if kind is GenerationStart else end(event)
                )
        except (SageError, ClientGoneError):
            raise
        except StopAsyncIteration:
            return
        except Exception as error:  # a task's border: the stream ends with an error event
            log.exception("request %s failed", self.call.request_id)
            raise InternalError(type(error).__name__) from error

    def _gather(self, data: bytes) -> None:
        if not data:
            return
        self.pending.append(data)
        if len(self.pending) > self.call.gateway.config.limits.queued_frames:
            if self.writer is not None:
                raise ClientGoneError
            self.flush()

    async def finish(self, tail: bytes) -> None:
        """Write what is left, `tail`, and the end of the answer."""
        if self.writer is not None:
            await self.writer
        self._write(b"".join(self.pending) + tail, more=False)
        if self.writer is not None:
            await self.writer

    def flush(self) -> None:
        """Write what has gathered, unless an earlier write still waits for the reader: then its task goes on with this."""
        if self.timer is None:
            self.timer = self.loop.call_later(self.call.gateway.config.timeouts.first_ping, self._on_timer)
        if self.pending and self.writer is None:
            data = b"".join(self.pending)
            self.pending.clear()
            self._write(data)

    def _write(self, data: bytes, *, more: bool = True) -> None:
        self.last_write = self.loop.time()
        sending = self._send(data, more=more)
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return  # as nearly always: the socket took it
        self.writer = self.loop.create_task(self._write_on(sending, waits_for))
        self.writer.add_done_callback(self._on_written)

    async def _send(self, data: bytes, *, more: bool) -> None:
        call = self.call
        if not call.started:
            # From here on failures are frames.
            call.started = True
            headers = [(b"content-type", self.frames.content_type), *_HEADERS, *call.headers_out]
            await call.send({"type": "http.response.start", "status": 200, "headers": headers})
        await call.send({"type": "http.response.body", "body": data, "more_body": more})

    async def _write_on(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> None:
        """Wait for a slow reader; one that takes nothing for the write timeout is dropped."""
        await self._in_time(carry_on(sending, waits_for))
        while self.pending:
            data = b"".join(self.pending)
            self.pending.clear()
            await self._in_time(self._send(data, more=True))

    async def _in_time(self, sending: Awaitable[None]) -> None:
        timer = self.loop.call_later(self.call.gateway.config.timeouts.write, self.guard.fail, ClientGoneError())
        try:
            await sending
        finally:
            timer.cancel()

    def _on_written(self, task: asyncio.Task[None]) -> None:
        self.writer = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self.guard.fail(error)

    def _on_timer(self) -> None:
        """Nothing came for a while: a comment keeps the connection open. The first one also tells that the request was accepted."""
        timeouts = self.call.gateway.config.timeouts
        idle = self.loop.time() - self.last_write
        if not self.call.started or idle >= timeouts.ping:
            idle = 0.0
            if self.writer is None:
                self._write(self.frames.ping)
        self.timer = self.loop.call_later(timeouts.ping - idle, self._on_timer)

    async def close(self) -> None:
        """Stop what still runs."""
        if self.timer is not None:
            self.timer.cancel()
        if self.writer is not None:
            self.writer.cancel()
            await asyncio.wait([self.writer])


@types.coroutine
def until_it_waits(step: Awaitable[Any], before: Callable[[], None]) -> Generator[Any, Any, Any]:
    """Await `step`, and call `before` if it does not end at once: the moment to write what has gathered."""
    inner = step.__await__()
    try:
        waits_for = next(inner)
    except StopIteration as end:
        return end.value
    try:
        before()
    except Exception as error:
        inner.throw(error)
        raise
    return (yield from _rest(inner, waits_for))


def _rest(inner: Any, waits_for: Any) -> Generator[Any, Any, Any]:
    """Go on with an awaitable that was begun by hand and waits for `waits_for` (as `yield from` would, PEP 380)."""
    try:
        while True:
            try:
                sent = yield waits_for
            except GeneratorExit:  # noqa: PERF203  (each step may fail)
                inner.close()
                raise
            except BaseException as error:  # noqa: BLE001  (a cancellation goes in as it would without us)
                waits_for = inner.throw(error)
            else:
                waits_for = inner.send(sent)
    except StopIteration as end:
        return end.value


carry_on = types.coroutine(_rest)


async def stream(call: Call, events: AsyncGenerator[Any, None], frames: Frames) -> None:
    """Write `events` to the client of `call` as they come; closing the connection aborts the request within a step.

    A failure before the first event is raised, so that it becomes a proper status. Later ones become an error frame, after
    which the stream ends without its normal terminator.

    Raises:
        SageError: the request failed before anything was sent.
        ClientGoneError: the client hung up, or reads too slowly.
    """
    call.gateway.admit()
    try:
        async with Guard(call.scope, call.receive, call.gateway.in_flight) as guard:
            out = _Stream(call, events, frames, guard)
            try:
                await out.run()
            except asyncio.CancelledError:
                if not (call.started and isinstance(guard.reason, SageError)):
                    raise
                # The server gave up on a stream that has begun (grace time over): say so in the stream.
                call.scope["sagellm.outcome"] = guard.reason.code.value
                guard.settle()
                await out.finish(frames.error(guard.reason))
            finally:
                await out.close()
    finally:
        await events.aclose()


@contextlib.asynccontextmanager
async def guarded(call: Call, events: AsyncGenerator[Any, None]) -> AsyncIterator[AsyncGenerator[Any, None]]:
    """Iterate over `events` for an answer in one piece; a client that hangs up ends the iteration and aborts the request.

    Raises:
        ClientGoneError: the client hung up.
    """
    call.gateway.admit()
    async with Guard(call.scope, call.receive, call.gateway.in_flight), contextlib.aclosing(events):
        yield events
