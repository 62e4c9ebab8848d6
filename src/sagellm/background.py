"""An event loop in a thread of its own: how code without asyncio calls the client, and how Ctrl-C gets through to it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from queue import SimpleQueue
from typing import Any, TypeVar

from sagellm_protocol.errors import CancelledRequestError, UnavailableError

__all__ = ["BackgroundLoop"]

_T = TypeVar("_T")
_UNWIND_S = 5.0
_CLOSED = "the client was closed while the call was under way"


class BackgroundLoop:
    """Runs coroutines for callers that wait; from many threads at once.

    A KeyboardInterrupt may hit the waiting thread between any two instructions. So nothing here holds a Python lock: a queue
    whose waiting is one call in C carries the result, and a call that was interrupted is cancelled.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._waiting: set[SimpleQueue[asyncio.Task[Any] | None]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="sagellm-client", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run `coroutine` on the loop and return its result.

        Raises:
            CancelledRequestError: `cancel_calls` ended it.
            UnavailableError: the loop was closed before it ended.
        """
        task = self._ended(coroutine)
        try:
            return task.result()
        except asyncio.CancelledError as error:
            if self.closed:
                raise UnavailableError(_CLOSED) from error
            raise CancelledRequestError("the call was cancelled") from error

    def cancel_calls(self) -> None:
        """Cancel every call under way; may be called from any thread, and from a signal handler."""
        if not self.closed:
            self._post(lambda: [task.cancel() for task in self._tasks])

    def stop(self) -> None:
        """Let the loop cancel what runs, and end; returns at once. Idempotent."""
        with contextlib.suppress(UnavailableError):
            self._post(self._stop.set)

    def close(self) -> None:
        """Let the loop cancel what runs, and end; waits for it. Idempotent."""
        self.stop()
        self._thread.join()

    @property
    def closed(self) -> bool:
        """Whether it takes no more calls."""
        return self._stop.is_set()

    def _ended(self, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run `coroutine` on the loop, wait, and return its task, which is done."""
        ended: SimpleQueue[asyncio.Task[_T] | None] = SimpleQueue()
        started: list[asyncio.Task[_T]] = []

        def start() -> None:
            if self.closed:
                ended.put(None)
                return
            task = self._loop.create_task(coroutine)
            started.append(task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(ended.put)

        def cancel() -> None:
            if started:
                started[0].cancel()
            else:
                coroutine.close()

        self._waiting.add(ended)
        try:
            self._post(start)
            task = ended.get()
        except KeyboardInterrupt:
            self._post(cancel)  # comes after `start`, if that was posted at all
            raise
        except UnavailableError:
            coroutine.close()
            raise
        finally:
            self._waiting.discard(ended)
        if task is None:
            if not started:
                coroutine.close()
            raise UnavailableError(_CLOSED)
        return task

    def _post(self, callback: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop has been closed
            raise UnavailableError(_CLOSED) from None

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()
        for ended in list(self._waiting):  # posted after the last turn of the loop
            ended.put(None)

    async def _serve(self) -> None:
        await self._stop.wait()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_UNWIND_S)
        await self._loop.shutdown_asyncgens()
