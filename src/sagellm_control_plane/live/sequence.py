"""One sequence on its way through engines: its attempts, the journal of its tokens, and the mailbox of its reader.

The reader sees one stream of `TokenDelta`, whatever happens to engines underneath: when an attempt fails, the next one is told the
tokens emitted so far and goes on after them, with the same seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextvars import Context
from typing import Protocol

import msgspec

from sagellm_control_plane.events import AttemptFailed, AttemptFinished, Event, FirstToken
from sagellm_control_plane.live.runs import Run, StreamRun, start_run
from sagellm_control_plane.live.split import SplitStats, split_stream
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import CancelledRequestError, EngineDiedError, Error, ErrorCode, SageError
from sagellm_protocol.generation import Usage
from sagellm_protocol.ports import EngineClient
from sagellm_protocol.sampling import SamplingParams

__all__ = ["Mailbox", "Sequence"]


class Mailbox:
    """What the sequences of one request have for its reader, in the order in which it came."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[tuple[int, TokenDelta | Error]] = []
        self._waiter: _Waiter | None = None

    def put(self, index: int, item: TokenDelta | Error) -> None:
        """Leave an item. A reader that waits runs before this returns, up to where it waits again, unless another task runs."""
        self._items.append((index, item))
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.wake()

    async def take(self) -> list[tuple[int, TokenDelta | Error]]:
        """Wait until there is something, and return all of it."""
        if not self._items:
            self._waiter = _Waiter(loop=asyncio.get_running_loop())
            await self._waiter
        items, self._items = self._items, []
        return items


class _Waiter(asyncio.Future[None]):
    """A future whose task can go on at once: a turn of the event loop less between an engine's bytes and the client's socket."""

    _step: Callable[[_Waiter], object] | None = None
    _context: Context | None = None

    def add_done_callback(self, fn: Callable[..., object], /, *, context: Context | None = None) -> None:
        """Note the step of the task that awaits this: a task adds exactly one callback."""
        self._step, self._context = fn, context
        super().add_done_callback(fn, context=context)

    def wake(self) -> None:
        """Be done. The task that waits runs now, or with the next turn of the loop if this is called by a task (two cannot run at once)."""
        step, context = self._step, self._context
        self._step = None
        if step is None or context is None or asyncio.current_task() is not None:
            self.set_result(None)
            return
        self.remove_done_callback(step)
        self.set_result(None)
        context.run(step, self)


class Core(Protocol):
    """Where a sequence tells what happened to it."""

    def feed(self, event: Event) -> None:
        """Take an event."""
        ...

    def feed_after(self, act: Callable[[], None], events: Iterable[Event]) -> None:
        """Do `act`, then take `events`, then what `act` itself led to."""
        ...


class _Attempt:
    """One engine's try at a sequence: the sink of its run."""

    __slots__ = ("_sequence", "engine_id", "last_at", "number", "run", "tokens")

    def __init__(self, sequence: Sequence, number: int, engine_id: str, now: float) -> None:
        self._sequence = sequence
        self.number = number
        self.engine_id = engine_id
        self.last_at = now
        self.tokens = 0
        self.run: Run | None = None

    def delta(self, delta: TokenDelta) -> None:
        """The engine produced something."""
        self._sequence.gained(self, delta)

    def ended(self, error: SageError | None) -> None:
        """The engine's stream ended too early."""
        if error is None:
            error = EngineDiedError(f"engine {self.engine_id} closed the stream before it was finished")
        self._sequence.attempt_failed(self, error.to_wire())


class Sequence:
    """Runs attempts and keeps the journal. Created by `Dispatcher.open`; decisions come from the core."""

    def __init__(
        self,
        index: int,
        request: EngineRequest,
        mailbox: Mailbox,
        core: Core,
        clock: Callable[[], float],
        split_stats: SplitStats,
    ) -> None:
        self.index = index
        self.request = request
        self.request_id = request.request_id  # <id> or <id>/k
        self.journal: list[int] = list(request.emitted_token_ids)
        self.engine_id = ""
        self.ended = False
        self.finished = False  # the core knows that it has finished
        self.cached_tokens = 0
        self.prompt_tokens: int | None = None
        self.engines: list[str] = []
        self.submitted_at = clock()
        self.dispatched_at: float | None = None
        self.first_at = 0.0  # the first delta's arrival
        self._mailbox = mailbox
        self._core = core
        self._clock = clock
        self._split_stats = split_stats
        self._attempts: dict[int, _Attempt] = {}
        self._winner: int | None = None
        self._started = False
        self._pieces = 0
        self._text: list[str] = []
        self.usage: Usage | None = None

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
        attempt = _Attempt(self, number, engine_id, self._clock())
        self._attempts[number] = attempt
        self.engines.append(engine_id)
        if self.dispatched_at is None:
            self.dispatched_at = attempt.last_at
        limit = self.request.sampling.max_tokens
        if limit is not None and len(self.journal) >= limit and self._winner is None:
            # The engine died between its last token and its last word: nothing is left to compute.
            self.gained(attempt, TokenDelta(request_id=self.request_id, finish_reason="length"))
            return
        request = self._engine_request(number)
        if prefill is None:
            attempt.run = start_run(client, request, attempt)
        else:
            attempt.run = StreamRun(split_stream(prefill, client, request, self._split_stats), attempt)

    def abort(self, number: int) -> None:
        """Stop attempt `number`; the engine frees its blocks."""
        attempt = self._attempts.pop(number, None)
        if self._winner == number:
            self._winner = None
        if attempt is not None and attempt.run is not None:
            attempt.run.cancel()

    def stop(self) -> None:
        """Stop every attempt: nobody reads any more."""
        for number in list(self._attempts):
            self.abort(number)

    def fail(self, error: Error) -> None:
        """Tell the reader; the sequence is over."""
        if not self.ended:
            self.ended = True
            self._mailbox.put(self.index, error)

    def fail_attempt(self, number: int, error: Error) -> None:
        """Give up an attempt from outside: its engine is dead, hung or to be emptied."""
        if number in self._attempts:
            self.abort(number)
            self._core.feed(AttemptFailed(self.request_id, number, error, self.emitted))

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

    def attempt_failed(self, attempt: _Attempt, error: Error) -> None:
        """An attempt ended badly; the core decides what follows."""
        if self._attempts.pop(attempt.number, None) is None:
            return
        if self._winner == attempt.number:
            self._winner = None
        self._core.feed(AttemptFailed(self.request_id, attempt.number, error, self.emitted))

    def gained(self, attempt: _Attempt, delta: TokenDelta) -> None:
        """Take in a delta of an attempt: journal, mailbox, and what the core must know."""
        if attempt.number not in self._attempts:
            return
        attempt.last_at = self._clock()
        if delta.error is not None or delta.finish_reason in ("error", "cancelled"):
            self.attempt_failed(attempt, delta.error or _ENGINE_ABORTED)
            return
        if delta.prompt_tokens is not None and self.prompt_tokens is None:
            self.prompt_tokens, self.cached_tokens = delta.prompt_tokens, delta.cached_tokens
        if delta.usage is not None:
            self.usage = delta.usage
        if not (delta.token_ids or delta.text or delta.reasoning or delta.tool_calls or delta.finish_reason):
            self._accepted(attempt, delta)
            return
        events: list[Event] = []
        if not attempt.tokens:
            events.append(self._begun(attempt, delta))
        attempt.tokens += max(len(delta.token_ids), 1)
        self.journal.extend(delta.token_ids)
        if not delta.token_ids and (delta.text or delta.reasoning or delta.tool_calls):
            self._pieces += delta.text_tokens or 1
            self._text.append(delta.text or "")
        if delta.finish_reason is not None:
            self.ended = self.finished = True
            del self._attempts[attempt.number]
            events.append(AttemptFinished(self.request_id, attempt.number, self.emitted))
        if events:
            self._core.feed_after(lambda: self._mailbox.put(self.index, delta), events)
        else:
            self._mailbox.put(self.index, delta)

    def _accepted(self, attempt: _Attempt, delta: TokenDelta) -> None:
        """The engine has taken the prompt; a first delta without a token tells the reader, once."""
        if not self._started:
            self._started = True
            self.first_at = attempt.last_at
            self.engine_id = attempt.engine_id
            self._mailbox.put(self.index, delta)

    def _begun(self, attempt: _Attempt, delta: TokenDelta) -> FirstToken:
        """The attempt's first token: it has won against a hedge, and the engine's prefill is over."""
        self._winner = attempt.number
        if not self._started:
            self._started = True
            self.first_at = attempt.last_at
        self.engine_id = attempt.engine_id
        cached = delta.cached_tokens if delta.prompt_tokens is not None else self.cached_tokens
        return FirstToken(self.request_id, attempt.number, cached)


_ENGINE_ABORTED = Error(
    code=ErrorCode.UNAVAILABLE, message="the engine gave the sequence up before it was finished", retryable=True
)
