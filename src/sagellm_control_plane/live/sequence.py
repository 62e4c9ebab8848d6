"""One sequence on its way through engines: its attempts, the journal of its tokens, and the mailbox of its reader.

The reader sees one stream of `TokenDelta`, whatever happens to engines underneath: when an attempt fails, the next one is told the
tokens emitted so far and goes on after them, with the same seed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import aclosing

import msgspec

from sagellm_control_plane.events import AttemptFailed, AttemptFinished, Event, FirstToken
from sagellm_control_plane.live.split import SplitStats, split_stream
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import CancelledRequestError, EngineDiedError, Error, ErrorCode, InternalError, SageError
from sagellm_protocol.generation import Usage
from sagellm_protocol.ports import EngineClient
from sagellm_protocol.sampling import SamplingParams

__all__ = ["Mailbox", "Sequence"]

_log = logging.getLogger(__name__)


class Mailbox:
    """What the sequences of one request have for its reader, in the order in which it came."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, TokenDelta | Error]] = deque()
        self._filled = asyncio.Event()

    def put(self, index: int, item: TokenDelta | Error) -> None:
        """Leave an item; never blocks."""
        self._items.append((index, item))
        self._filled.set()

    async def take(self) -> list[tuple[int, TokenDelta | Error]]:
        """Wait until there is something, and return all of it."""
        await self._filled.wait()
        self._filled.clear()
        items = list(self._items)
        self._items.clear()
        return items


class _Attempt:
    """One engine's try at a sequence."""

    __slots__ = ("engine_id", "last_at", "number", "task", "tokens")

    def __init__(self, number: int, engine_id: str, now: float) -> None:
        self.number = number
        self.engine_id = engine_id
        self.last_at = now
        self.tokens = 0
        self.task: asyncio.Task[None] | None = None


class Sequence:
    """Runs attempts and keeps the journal. Created by `Dispatcher.open`; decisions come from the core."""

    def __init__(
        self,
        index: int,
        request: EngineRequest,
        mailbox: Mailbox,
        feed: Callable[[Event], None],
        clock: Callable[[], float],
        split_stats: SplitStats,
    ) -> None:
        self.index = index
        self.request = request
        self.journal: list[int] = list(request.emitted_token_ids)
        self.engine_id = ""
        self.ended = False
        self.cached_tokens = 0
        self.prompt_tokens: int | None = None
        self.engines: list[str] = []
        self.submitted_at = clock()
        self.dispatched_at: float | None = None
        self._mailbox = mailbox
        self._feed = feed
        self._clock = clock
        self._split_stats = split_stats
        self._attempts: dict[int, _Attempt] = {}
        self._winner: int | None = None
        self._started = False
        self._pieces = 0
        self._text: list[str] = []
        self.usage: Usage | None = None

    @property
    def request_id(self) -> str:
        """Id of the sequence: ``<id>`` or ``<id>/k``."""
        return self.request.request_id

    @property
    def emitted(self) -> int:
        """Tokens that reached us (pieces of text, where an engine gives no ids)."""
        return max(len(self.journal), self._pieces)

    def attempts_on(self, engine_id: str) -> list[int]:
        """Numbers of the attempts that are running on an engine."""
        return [a.number for a in self._attempts.values() if a.engine_id == engine_id]

    def stalled(self, now: float, limit_s: float) -> list[int]:
        """Numbers of the attempts that have begun to produce tokens and then fell silent for `limit_s`."""
        return [a.number for a in self._attempts.values() if a.tokens and now - a.last_at > limit_s]

    # -- commands of the core --------------------------------------------------------------------------------------

    def start(self, number: int, engine_id: str, client: EngineClient, prefill: EngineClient | None = None) -> None:
        """Begin attempt `number`; with `prefill`, the prompt is computed there and handed over."""
        attempt = _Attempt(number, engine_id, self._clock())
        self._attempts[number] = attempt
        self.engines.append(engine_id)
        if self.dispatched_at is None:
            self.dispatched_at = attempt.last_at
        limit = self.request.sampling.max_tokens
        if limit is not None and len(self.journal) >= limit and self._winner is None:
            # The engine died between its last token and its last word: nothing is left to compute.
            self._on_delta(attempt, TokenDelta(request_id=self.request_id, finish_reason="length"))
            return
        attempt.task = asyncio.get_running_loop().create_task(
            self._run(attempt, client, prefill, self._engine_request(number))
        )
        attempt.task.add_done_callback(lambda task: self._on_task_done(attempt, task))

    def abort(self, number: int) -> None:
        """Stop attempt `number`; the engine frees its blocks."""
        attempt = self._attempts.pop(number, None)
        if self._winner == number:
            self._winner = None
        if attempt is not None and attempt.task is not None:
            attempt.task.cancel()

    def fail(self, error: Error) -> None:
        """Tell the reader; the sequence is over."""
        if not self.ended:
            self.ended = True
            self._mailbox.put(self.index, error)

    def fail_attempt(self, number: int, error: Error) -> None:
        """Give up an attempt from outside: its engine is dead, hung or to be emptied."""
        if number in self._attempts:
            self.abort(number)
            self._feed(AttemptFailed(self.request_id, number, error, self.emitted))

    def cancelled(self) -> None:
        """Somebody else cancelled the request."""
        self.fail(CancelledRequestError("the request was cancelled").to_wire())

    # -- one attempt -----------------------------------------------------------------------------------------------

    def _engine_request(self, number: int) -> EngineRequest:
        request = self.request
        if number == 1 and not self.journal:
            return request
        deadline = request.deadline_s
        if deadline is not None:
            deadline = max(deadline - (self._clock() - self.submitted_at), 0.001)
        return msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}#{number}",
            emitted_token_ids=tuple(self.journal),
            emitted_text="".join(self._text),
            sampling=self._sampling(),
            deadline_s=deadline,
        )

    def _sampling(self) -> SamplingParams:
        """An engine that takes text counts from its own first token: give it what is left."""
        sampling = self.request.sampling
        if not self._pieces or sampling.max_tokens is None:
            return sampling
        return msgspec.structs.replace(sampling, max_tokens=max(sampling.max_tokens - self._pieces, 1))

    async def _run(
        self, attempt: _Attempt, client: EngineClient, prefill: EngineClient | None, request: EngineRequest
    ) -> None:
        if prefill is None:
            deltas = client.stream(request)
        else:
            deltas = split_stream(prefill, client, request, self._split_stats)
        try:
            async with aclosing(deltas) as stream:
                async for delta in stream:
                    if not self._on_delta(attempt, delta):
                        return
        except SageError as error:
            self._attempt_failed(attempt, error.to_wire())
            return
        died = EngineDiedError(f"engine {attempt.engine_id} closed the stream before it was finished")
        self._attempt_failed(attempt, died.to_wire())

    def _on_task_done(self, attempt: _Attempt, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        _log.error("attempt %s of %s on %s", attempt.number, self.request_id, attempt.engine_id, exc_info=error)
        self._attempt_failed(attempt, InternalError("the engine's client failed unexpectedly").to_wire())

    def _attempt_failed(self, attempt: _Attempt, error: Error) -> None:
        if self._attempts.pop(attempt.number, None) is None:
            return
        if self._winner == attempt.number:
            self._winner = None
        self._feed(AttemptFailed(self.request_id, attempt.number, error, self.emitted))

    def _on_delta(self, attempt: _Attempt, delta: TokenDelta) -> bool:
        """Take in a delta; False when the attempt has nothing more to say."""
        if attempt.number not in self._attempts:
            return False
        attempt.last_at = self._clock()
        if delta.error is not None or delta.finish_reason in ("error", "cancelled"):
            self._attempt_failed(attempt, delta.error or _ENGINE_ABORTED)
            return False
        if delta.prompt_tokens is not None and self.prompt_tokens is None:
            self.prompt_tokens, self.cached_tokens = delta.prompt_tokens, delta.cached_tokens
        if delta.usage is not None:
            self.usage = delta.usage
        if not (delta.token_ids or delta.text or delta.reasoning or delta.tool_calls or delta.finish_reason):
            if not self._started:
                self._started = True
                self.engine_id = attempt.engine_id
                self._mailbox.put(self.index, delta)
            return True
        if not attempt.tokens:
            self._begin(attempt, delta)
        attempt.tokens += max(len(delta.token_ids), 1)
        self.journal.extend(delta.token_ids)
        if not delta.token_ids and (delta.text or delta.reasoning or delta.tool_calls):
            self._pieces += delta.text_tokens or 1
            self._text.append(delta.text or "")
        self._mailbox.put(self.index, delta)
        if delta.finish_reason is None:
            return True
        self.ended = True
        self._attempts.pop(attempt.number, None)
        self._feed(AttemptFinished(self.request_id, attempt.number, self.emitted))
        return False

    def _begin(self, attempt: _Attempt, delta: TokenDelta) -> None:
        """The attempt's first token: it has won against a hedge, and the engine's prefill is over."""
        self._winner = attempt.number
        self._started = True
        self.engine_id = attempt.engine_id
        cached = delta.cached_tokens if delta.prompt_tokens is not None else self.cached_tokens
        self._feed(FirstToken(self.request_id, attempt.number, cached))


_ENGINE_ABORTED = Error(
    code=ErrorCode.UNAVAILABLE, message="the engine gave the sequence up before it was finished", retryable=True
)
