"""One embedding or scoring request on its way to an engine: the same placing, retries and leases as for text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sagellm_control_plane.events import AttemptFailed, AttemptFinished, Event
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.errors import Error, InternalError, SageError, UnsupportedError
from sagellm_protocol.ports import EmbeddingClient, EngineClient

__all__ = ["EmbeddingJob"]

_log = logging.getLogger(__name__)


class EmbeddingJob:
    """What the dispatcher runs (the counterpart of `live.sequence.Sequence`); the result is awaited by one reader."""

    def __init__(self, request: EmbedRequest, feed: Callable[[Event], None]) -> None:
        self.request = request
        self.ended = False
        self.finished = False  # the core knows that it has finished
        self.result: asyncio.Future[EmbedResult] = asyncio.get_running_loop().create_future()
        self._feed = feed
        self._attempts: dict[int, tuple[str, asyncio.Task[EmbedResult]]] = {}

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def emitted(self) -> int:
        """Nothing is emitted before the end."""
        return 0

    def attempts_on(self, engine_id: str) -> list[int]:
        """Numbers of the attempts that are running on an engine."""
        return [number for number, (engine, _task) in self._attempts.items() if engine == engine_id]

    def stalled(self, now: float, limit_s: float) -> list[int]:
        """A vector comes whole: silence says nothing."""
        del now, limit_s
        return []

    def start(self, number: int, engine_id: str, client: EngineClient) -> None:
        """Begin attempt `number`."""
        task = asyncio.get_running_loop().create_task(self._run(client))
        self._attempts[number] = (engine_id, task)
        task.add_done_callback(lambda done: self._on_done(number, done))

    async def _run(self, client: EngineClient) -> EmbedResult:
        if not isinstance(client, EmbeddingClient):
            raise UnsupportedError(f"engine {client.engine_id} serves a model that gives no vectors", param="model")
        return await client.embed(self.request)

    def _on_done(self, number: int, task: asyncio.Task[EmbedResult]) -> None:
        if self._attempts.pop(number, None) is None or task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.ended = self.finished = True
            if not self.result.done():
                self.result.set_result(task.result())
            self._feed(AttemptFinished(self.request_id, number, 0))
            return
        if not isinstance(error, SageError):
            _log.error("embedding %s", self.request_id, exc_info=error)
            error = InternalError("the engine's client failed unexpectedly")
        self._feed(AttemptFailed(self.request_id, number, error.to_wire()))

    def abort(self, number: int) -> None:
        """Stop attempt `number`."""
        attempt = self._attempts.pop(number, None)
        if attempt is not None:
            attempt[1].cancel()

    def stop(self) -> None:
        """Stop every attempt: nobody waits any more."""
        for number in list(self._attempts):
            self.abort(number)

    def fail(self, error: Error) -> None:
        """Tell the reader."""
        self.ended = True
        if not self.result.done():
            self.result.set_exception(SageError.from_wire(error))

    def fail_attempt(self, number: int, error: Error) -> None:
        """Give up an attempt from outside."""
        if number in self._attempts:
            self.abort(number)
            self._feed(AttemptFailed(self.request_id, number, error))
