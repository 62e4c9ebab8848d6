"""One engine's answer to one sequence, pushed to its sink as it comes.

A client that can push (`PushingClient`) calls the sink where the bytes arrive. For any other client a task pulls its stream: a few dozen
microseconds more for each request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from sagellm_protocol.deltas import join_deltas
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import InternalError, ResourceExhaustedError, SageError
from sagellm_protocol.ports import EngineClient

__all__ = ["DeltaSink", "PushingClient", "Run", "StreamRun", "pulled", "start_run"]

_log = logging.getLogger(__name__)


class DeltaSink(Protocol):
    """Who is told. After `ended`, or a delta that finishes the sequence, nothing more comes."""

    def delta(self, delta: TokenDelta) -> None:
        """The sequence gained something, or finished."""
        ...

    def ended(self, error: SageError | None) -> None:
        """The stream ended before a delta had finished the sequence; None if nobody knows why."""
        ...


class Run(Protocol):
    """An answer under way."""

    def cancel(self) -> None:
        """Have no more of it: the engine aborts, the sink is told nothing. Idempotent."""
        ...


class PushingClient(Protocol):
    """An `EngineClient` that pushes."""

    def push(self, request: EngineRequest, sink: DeltaSink) -> Run:
        """Run one sequence; failures go to `sink`, at once where they are known at once."""
        ...


def start_run(client: EngineClient, request: EngineRequest, sink: DeltaSink) -> Run:
    """Run `request` on `client`; what comes of it goes to `sink`."""
    push = getattr(client, "push", None)
    if push is not None:
        run: Run = push(request, sink)
        return run
    return StreamRun(client.stream(request), sink)


class StreamRun:
    """Pulls a stream in a task of its own."""

    def __init__(self, deltas: AsyncGenerator[TokenDelta, None], sink: DeltaSink) -> None:
        self._sink: DeltaSink | None = sink
        self._task = asyncio.get_running_loop().create_task(self._pull(deltas))
        self._task.add_done_callback(self._done)

    def cancel(self) -> None:
        """Close the stream; the engine frees its blocks."""
        self._sink = None
        self._task.cancel()

    async def _pull(self, deltas: AsyncGenerator[TokenDelta, None]) -> None:
        error: SageError | None = None
        try:
            async with aclosing(deltas) as stream:
                async for delta in stream:
                    if self._sink is not None:
                        self._sink.delta(delta)
                    if self._sink is None or delta.finish_reason is not None or delta.error is not None:
                        return
        except SageError as failure:
            error = failure
        if self._sink is not None:
            self._sink.ended(error)

    def _done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._sink is not None:
            _log.error("the client of an engine failed", exc_info=error)
            self._sink.ended(InternalError("the engine's client failed unexpectedly"))


async def pulled(
    start: Callable[[EngineRequest, DeltaSink], Run], request: EngineRequest, *, limit: int | None = None
) -> AsyncGenerator[TokenDelta, None]:
    """Yield what a pushing client pushes; what waits for the reader comes joined. Closing the generator cancels the run.

    Args:
        start: of the client.
        request: to run.
        limit: tokens that may wait; above that the run is cancelled.

    Raises:
        SageError: the stream ended with it.
        ResourceExhaustedError: the reader lags beyond `limit`.
    """
    inbox = _Inbox(request.request_id, limit)
    run = inbox.run = start(request, inbox)
    try:
        while True:
            delta = await inbox.next()
            if delta is None:
                return
            yield delta
            if delta.finish_reason is not None:
                return
    finally:
        run.cancel()


class _Inbox:
    """A sink that is read."""

    def __init__(self, request_id: str, limit: int | None) -> None:
        self.run: Run | None = None
        self._request_id = request_id
        self._limit = limit
        self._deltas: list[TokenDelta] = []
        self._tokens = 0
        self._ended = False
        self._error: SageError | None = None
        self._filled = asyncio.Event()

    def delta(self, delta: TokenDelta) -> None:
        self._deltas.append(delta)
        self._tokens += len(delta.token_ids)
        if self._limit is not None and self._tokens > self._limit and self.run is not None:
            self.run.cancel()
            self._error = ResourceExhaustedError(
                f"request {self._request_id!r} is not read and its buffer is full: aborted; read faster"
            )
        self._filled.set()

    def ended(self, error: SageError | None) -> None:
        self._ended, self._error = True, error
        self._filled.set()

    async def next(self) -> TokenDelta | None:
        """Return all that waits as one delta, None at an end that nobody explained."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._filled.clear()
            await self._filled.wait()
        joined = join_deltas(self._deltas)
        self._deltas.clear()
        self._tokens = 0
        return joined
