"""Events of a request -> frames on a socket.

A producer task turns events into frames as they come; the request's own task writes all frames that have gathered in one
write. A write costs some twenty microseconds and a frame a fraction of one, so a fast engine is never slowed by one slow
step of the writer, and a reader that does not keep up holds back nobody but itself: beyond a bound its request is aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
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
    """The queue between the producer of one stream and its writer."""

    def __init__(self, call: Call, events: AsyncIterator[Any], frames: Frames, guard: Guard) -> None:
        self.call = call
        self.events = events
        self.frames = frames
        self.guard = guard
        self.pending: list[bytes] = []
        self.done = False
        self.failure: SageError | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.loop = asyncio.get_running_loop()
        self.last_write = self.loop.time()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def produce(self) -> None:
        """Turn events into frames until they end, fail, or the reader is too far behind."""
        frames = self.frames
        start, delta, end = frames.start, frames.delta, frames.end
        bound = self.call.gateway.config.limits.queued_frames
        try:
            async for event in self.events:
                kind = type(event)
                data = delta(event) if kind is ChoiceDelta else start(event) if kind is GenerationStart else end(event)
                if data:
                    self.pending.append(data)
                    if len(self.pending) > bound:
                        self.guard.fail(ClientGoneError())
                        return
                    self.wake()
        except SageError as error:
            self.failure = error
        except Exception as error:  # a task's border: the stream ends with an error event
            log.exception("request %s failed", self.call.request_id)
            self.failure = InternalError(type(error).__name__)
        finally:
            self.done = True
            self.wake()

    async def wait(self, timeout: float) -> None:
        """Return when there is something to write, when the producer is done, or after `timeout` seconds."""
        if self.pending or self.done:
            return
        self.waiter = self.loop.create_future()
        timer = self.loop.call_later(timeout, self.wake)
        try:
            await self.waiter
        finally:
            timer.cancel()
            self.waiter = None

    async def open(self) -> None:
        """Send the head of the answer: from here on failures are frames."""
        call = self.call
        call.started = True
        headers = [(b"content-type", self.frames.content_type), *_HEADERS, *call.headers_out]
        await call.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send `data`; a reader that takes nothing for the write timeout is dropped."""
        timer = self.loop.call_later(self.call.gateway.config.timeouts.write, self.guard.fail, ClientGoneError())
        try:
            await self.call.send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            timer.cancel()

    async def run(self) -> None:
        """Write what the producer makes, in as few writes as it allows."""
        timeouts = self.call.gateway.config.timeouts
        await self.wait(timeouts.first_ping)
        if self.failure is not None and not self.pending:
            raise self.failure
        await self.open()
        while True:
            data, finished = b"".join(self.pending), self.done
            self.pending.clear()
            if finished:
                break
            await self.write(data or self.frames.ping)
            await self.wait(timeouts.ping)
        if self.failure is not None:
            self.call.scope["sagellm.outcome"] = self.failure.code.value
            data += self.frames.error(self.failure)
        await self.write(data, more=False)


async def stream(call: Call, events: AsyncGenerator[Any, None], frames: Frames) -> None:
    """Write `events` to the client of `call` as they come; closing the connection aborts the request within a step.

    A failure before the first event is raised, so that it becomes a proper status. Later ones become an error frame, after
    which the stream ends without its normal terminator.

    Raises:
        SageError: the request failed before anything was sent.
        ClientGoneError: the client hung up, or reads too slowly.
    """
    call.gateway.admit()
    async with contextlib.aclosing(events), Guard(call.scope, call.receive, call.gateway.in_flight) as guard:
        out = _Stream(call, events, frames, guard)
        producer = asyncio.create_task(out.produce())
        try:
            await out.run()
        except asyncio.CancelledError:
            if not (call.started and isinstance(guard.reason, SageError)):
                raise
            # The server gave up on a stream that has begun (grace time over): say so in the stream.
            call.scope["sagellm.outcome"] = guard.reason.code.value
            guard.settle()
            await out.write(b"".join(out.pending) + frames.error(guard.reason), more=False)
        finally:
            await _stop(producer)


async def _stop(task: asyncio.Task[None]) -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def guarded(call: Call, events: AsyncGenerator[Any, None]) -> AsyncIterator[AsyncGenerator[Any, None]]:
    """Iterate over `events` for an answer in one piece; a client that hangs up ends the iteration and aborts the request.

    Raises:
        ClientGoneError: the client hung up.
    """
    call.gateway.admit()
    async with Guard(call.scope, call.receive, call.gateway.in_flight), contextlib.aclosing(events):
        yield events
