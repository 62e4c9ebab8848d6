"""A request's lifeline: its task is cancelled when the client goes away, or when the server gives up on it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any

__all__ = ["ClientGoneError", "Deadline", "Guard", "InFlight"]


class ClientGoneError(Exception):
    """The client hung up: there is nobody to answer."""


class Deadline:
    """Context manager that turns a block into `asyncio.TimeoutError` after some seconds.

    `asyncio.timeout` needs Python 3.11, and `asyncio.wait_for` costs a task on each call.
    """

    __slots__ = ("_fired", "_seconds", "_task", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._fired = False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._fire)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._timer.cancel()
        if self._fired and kind is asyncio.CancelledError:
            if sys.version_info >= (3, 11) and self._task is not None:
                self._task.uncancel()
            raise asyncio.TimeoutError from None

    def _fire(self) -> None:
        self._fired = True
        if self._task is not None:
            self._task.cancel()


class InFlight:
    """The guards of the requests that run."""

    def __init__(self) -> None:
        self._guards: set[Guard] = set()
        self._idle: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._guards)

    def add(self, guard: Guard) -> None:
        """A request begins."""
        self._guards.add(guard)

    def discard(self, guard: Guard) -> None:
        """A request has ended."""
        self._guards.discard(guard)
        while self._idle and not self._guards:
            waiter = self._idle.pop()
            if not waiter.done():
                waiter.set_result(None)

    def guards(self) -> list[Guard]:
        """Return the guards of now."""
        return list(self._guards)

    async def idle(self) -> None:
        """Return when no request runs."""
        if self._guards:
            waiter = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter


class Guard:
    """Async context manager around the work of one request, after its body was read.

    Leaving it for a reason of `fail` raises that reason instead of the cancellation.
    """

    __slots__ = ("_listener", "_receive", "_registry", "_task", "_watch", "reason")

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        registry: InFlight,
    ) -> None:
        # Our own server calls back when the connection ends; others are asked, by a task that waits.
        self._watch: Callable[[Callable[[], None] | None], None] | None = scope.get("sagellm.on_disconnect")
        self._receive = receive
        self._registry = registry
        self._task: asyncio.Task[Any] | None = None
        self._listener: asyncio.Task[None] | None = None
        self.reason: Exception | None = None

    async def __aenter__(self) -> Guard:
        self._task = asyncio.current_task()
        self._registry.add(self)
        if self._watch is not None:
            self._watch(self._gone)
        else:
            self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._registry.discard(self)
        if self._watch is not None:
            self._watch(None)
        elif self._listener is not None:
            self._listener.cancel()
            # It keeps the cancellation, whose traceback leads back here: a cycle a request, for the collector to find.
            self._listener = None
        if kind is asyncio.CancelledError and self.reason is not None:
            self.settle()
            raise self.reason from None

    def settle(self) -> None:
        """Take back the cancellation that `fail` asked for, once it was handled."""
        if sys.version_info >= (3, 11) and self._task is not None:
            self._task.uncancel()

    def fail(self, reason: Exception) -> None:
        """Cancel the work for `reason`; the first reason stays."""
        if self.reason is None and self._task is not None and not self._task.done():
            self.reason = reason
            self._task.cancel()

    def _gone(self) -> None:
        self.fail(ClientGoneError())

    async def _listen(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._gone()
                return
