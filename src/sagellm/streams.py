"""Streams of deltas: taking a broken one up again, and iterating without asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from sagellm.background import BackgroundLoop
from sagellm.results import Delta
from sagellm.transport import Place, Transport
from sagellm_protocol.errors import CancelledRequestError, UnavailableError

__all__ = ["DeltaStream", "resuming_stream"]

_MAX_TRIES = 3


class _ReplayDiffersError(UnavailableError):
    """The same request did not give the same text again."""


async def resuming_stream(transport: Transport, path: str, body: dict[str, Any]) -> AsyncGenerator[Delta, None]:
    """Yield deltas; a stream that breaks in the middle is taken up again where it stood.

    A server of ours names its events, and goes on behind the last one: choices, reasoning and tool calls included. Another one is
    sent the request again, and what was already seen is skipped: the same seed gives the same tokens. Where that replay says
    something else (a server that ignores seeds), or where more than one choice or a tool call is under way, the break is
    reported instead. So it is when the stream broke `_MAX_TRIES` times without anything new.
    """
    body = {**body, "stream": True}
    if body.get("n", 1) == 1 and body.get("temperature") != 0 and "seed" not in body:
        body["seed"] = random.getrandbits(31)
    place, begun, seen, tries = Place(), False, "", 0
    replayable = body.get("n", 1) == 1
    started = time.perf_counter()
    while True:
        skip = "" if place.event_id else seen
        try:
            async with contextlib.aclosing(transport.events(path, body, place)) as chunks:
                async for chunk in chunks:
                    delta = Delta(chunk, latency_ms=(time.perf_counter() - started) * 1000)
                    replayable = replayable and not delta.tool_calls
                    if skip:
                        new, skip = _without_prefix(delta, skip)
                        if new is None:
                            continue
                        delta = new
                    begun, seen, tries = begun or _says_something(delta), seen + delta.text, 0
                    yield delta
        except _ReplayDiffersError:
            raise
        except UnavailableError:
            tries += 1
            if (begun and not (place.event_id or replayable)) or tries >= _MAX_TRIES:
                raise
        else:
            return


def _says_something(delta: Delta) -> bool:
    """Return whether it holds more than the role, which may come twice."""
    for choice in delta.get("choices", ()):
        fields = choice["delta"] if "delta" in choice else {"text": choice.get("text")}
        if any(value for name, value in fields.items() if name != "role"):
            return True
    return False


def _without_prefix(delta: Delta, skip: str) -> tuple[Delta | None, str]:
    """Return what `delta` adds beyond `skip`, and what of `skip` is still to come."""
    text = delta.text
    if skip.startswith(text) and not delta.finish_reason:
        return None, skip[len(text) :]
    if not text.startswith(skip):
        raise _ReplayDiffersError("the stream broke, and its replay says something else: send the request again")
    chunk = dict(delta)
    choice = dict(chunk["choices"][0])
    if "delta" in choice:
        choice["delta"] = {**choice["delta"], "content": text[len(skip) :]}
    else:
        choice["text"] = text[len(skip) :]
    chunk["choices"] = [choice, *chunk["choices"][1:]]
    return Delta(chunk, latency_ms=delta.latency_ms), ""


class DeltaStream(Iterator[Delta]):
    """A stream for code without asyncio: iterate over it; leaving the ``with`` block or `close` aborts the request.

    Closing works from any thread, and wherever Ctrl-C ended the waiting: a step may still run on the client's loop then, so
    the stream knows its step, and ends that first.
    """

    def __init__(self, deltas: AsyncIterator[Delta], background: BackgroundLoop) -> None:
        self._deltas = deltas
        self._background = background
        self._step: asyncio.Task[Any] | None = None
        self._closed = False

    def __iter__(self) -> DeltaStream:
        return self

    def __next__(self) -> Delta:
        if self._closed:
            raise StopIteration
        try:
            delta = self._background.call(self._next())
        except CancelledRequestError:
            if self._closed:  # meanwhile, by another thread
                raise StopIteration from None
            self.close()
            raise
        except BaseException:
            self.close()
            raise
        if delta is None:
            self._closed = True
            raise StopIteration
        return delta

    async def _next(self) -> Delta | None:
        self._step = asyncio.current_task()
        return await anext(self._deltas, None)

    def close(self) -> None:
        """Abort the request if it has not ended. Idempotent."""
        if not self._closed:
            self._closed = True
            if not self._background.closed:
                self._background.call(self._end())

    async def _end(self) -> None:
        if self._step is not None and not self._step.done():
            self._step.cancel()
            await asyncio.wait([self._step])
        if isinstance(self._deltas, AsyncGenerator):
            await self._deltas.aclose()

    def __enter__(self) -> DeltaStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
