"""One client request: text in, events out, over one sequence for each choice."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

import msgspec

from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.sequence import Mailbox, Sequence
from sagellm_control_plane.view import RequestView
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import Error, SageError
from sagellm_protocol.generation import (
    GenerationEnd,
    GenerationEvent,
    GenerationRequest,
    GenerationStart,
    TokenLogprob,
    Usage,
)
from sagellm_protocol.ports import ChatModel, PreparedRequest

__all__ = ["Generation"]


class Generation:
    """Runs the choices of one request at once and merges them. `close` may be called at any time, more than once."""

    def __init__(self, dispatcher: Dispatcher, model: ChatModel, prepared: PreparedRequest) -> None:
        self.request: GenerationRequest = prepared.source
        self.began = time.monotonic()
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.sequences: list[Sequence] = []
        self._dispatcher = dispatcher
        self._model = model
        self._mailbox = Mailbox()
        self._prepared = prepared
        self._decoders = [model.decoder(self._prepared, i) for i in range(len(self._prepared.engine_requests))]
        self._open: set[int] = set()
        self._sent_at: float | None = None
        self._started = False
        self._failure: Error | None = None

    @property
    def engine_id(self) -> str:
        """Engine of the first choice, empty while it has none."""
        return self.sequences[0].engine_id if self.sequences else ""

    @property
    def waiting(self) -> bool:
        """Whether no choice has been sent to an engine yet."""
        return all(sequence.dispatched_at is None for sequence in self.sequences)

    @property
    def waited_s(self) -> float:
        """Seconds until the first choice was sent to an engine; 0 while it waits."""
        sent = [s.dispatched_at - s.submitted_at for s in self.sequences if s.dispatched_at is not None]
        return min(sent, default=0.0)

    def engine_rss_bytes(self) -> int:
        """Resident memory of the engines that served this, as they last reported it."""
        engines = {engine_id for sequence in self.sequences for engine_id in sequence.engines}
        found = (self._dispatcher.registry.find(engine_id) for engine_id in engines)
        return max((e.status.rss_bytes for e in found if e is not None and e.status is not None), default=0)

    def usage(self) -> Usage:
        """Tokens so far."""
        prompt, completion, cached = None, 0, 0
        for sequence in self.sequences:
            if prompt is None:
                prompt = sequence.prompt_tokens
            completion += sequence.usage.completion_tokens if sequence.usage else sequence.emitted
            cached = max(cached, sequence.cached_tokens)
        if prompt is None:
            prompt = len(self._prepared.engine_requests[0].prompt_token_ids)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)

    def cancel(self) -> None:
        """End the request from outside: its reader gets `CancelledRequestError`."""
        for sequence in self.sequences:
            if sequence.index in self._open:
                sequence.cancelled()

    def close(self) -> None:
        """Abort whatever still runs."""
        for sequence in self.sequences:
            self._dispatcher.close(sequence)
        self._open.clear()

    async def events(self) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the request's events.

        Raises:
            SageError: a choice failed; the others are aborted.
        """
        try:
            self.open()
            while events := await self.more():
                for event in events:
                    yield event
        finally:
            self.close()

    def open(self) -> None:
        """Send the choices on their way; for `more`, by who does not want `events`."""
        for index, engine_request in enumerate(self._prepared.engine_requests):
            self._open.add(index)
            view = self._view(engine_request)
            self.sequences.append(self._dispatcher.open(index, engine_request, view, self._mailbox))
        self._sent_at = self.sequences[0].dispatched_at  # None: it waits for an engine

    async def more(self) -> list[GenerationEvent]:
        """Wait until something happens and return its events; nothing when all is over.

        Raises:
            SageError: a choice failed.
        """
        out: list[GenerationEvent] = []
        while self._open and not out:
            if self._failure is not None:
                raise SageError.from_wire(self._failure)
            for index, item in await self._mailbox.take():
                if isinstance(item, Error):
                    self._failure = item  # after what came before it
                    break
                if index in self._open:  # else it was still under way when a stop string matched
                    self._take(index, item, out)
            else:
                if not self._open:
                    self.ended_at = time.monotonic()
                    out.append(self._end())
        return out

    def _take(self, index: int, item: TokenDelta, out: list[GenerationEvent]) -> None:
        if not self._started:
            self._started = True
            self._note_added(self._sent_at, self.sequences[index].first_at)
            out.append(self._start(index, item))
        if self.first_token_at is None and (item.token_ids or item.text or item.reasoning or item.tool_calls):
            self.first_token_at = time.monotonic()
        gained = self._decoders[index].push(item)
        if (gained is not None and gained.finish_reason is not None) or item.finish_reason is not None:
            self._finish(index)
        if gained is not None:
            out.append(gained if gained.index == index else msgspec.structs.replace(gained, index=index))

    def _note_added(self, sent_at: float | None, arrived_at: float) -> None:
        """Count our own share of the time to the first token: from here to the engine, and from the engine's bytes to the reader."""
        if sent_at is not None and arrived_at:
            self._dispatcher.added.add(sent_at - self.began + time.monotonic() - arrived_at)

    def _view(self, request: EngineRequest) -> RequestView:
        source = self.request
        blocks, block_tokens = self._dispatcher.blocks_of(request, source.model, self._prepared.text)
        return RequestView(
            request_id=request.request_id,
            model=source.model,
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens or 0,
            blocks=blocks,
            block_tokens=block_tokens,
            priority=request.priority,
            tenant=source.tenant,
            session=source.metadata.get("session_id", ""),
            zone=source.metadata.get("zone", ""),
            adapter=request.adapter or "",
            deadline_s=request.deadline_s,
            arrived_at=self._dispatcher.clock(),
            emitted=len(request.emitted_token_ids),
        )

    def _start(self, index: int, delta: TokenDelta) -> GenerationStart:
        logprobs = delta.prompt_logprobs
        if logprobs is not None:
            # A text side that knows the bytes of its tokens spells them; the port alone gives text.
            spell = getattr(self._model, "spell_logprobs", None)
            if spell is not None:
                logprobs = tuple(spell(logprobs))
            else:
                logprobs = tuple(None if entry is None else self._with_text(entry) for entry in logprobs)
        return GenerationStart(
            request_id=self.request.request_id,
            model=self.request.model,
            prompt_tokens=self.usage().prompt_tokens,
            engine_id=self.sequences[index].engine_id,
            prompt_logprobs=logprobs,
        )

    def _with_text(self, entry: TokenLogprob) -> TokenLogprob:
        """Engines know ids only: add what each of them reads."""
        if entry.text:
            return entry
        text = self._model.detokenize([entry.token_id])
        top = tuple(self._with_text(other) for other in entry.top)
        return msgspec.structs.replace(entry, text=text, data=text.encode("utf-8", "replace"), top=top)

    def _finish(self, index: int) -> None:
        self._open.discard(index)
        # A stop string may have matched while the engine goes on: closing aborts it.
        self._dispatcher.close(self.sequences[index], finished=True)

    def _end(self) -> GenerationEnd:
        first = self.first_token_at
        return GenerationEnd(
            usage=self.usage(),
            ttft_s=None if first is None else first - self.began,
            duration_s=time.monotonic() - self.began,
        )
