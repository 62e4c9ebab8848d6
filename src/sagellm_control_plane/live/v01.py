"""Requests in the words of protocol v0.1: run to the end, streamed, or submitted and asked for later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from sagellm_control_plane.live.requests import RequestEntry, RequestTable, metrics_of, response_of
from sagellm_control_plane.types import RequestStatus
from sagellm_protocol.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    Error,
    InvalidArgumentError,
    SageError,
    UnsupportedError,
)
from sagellm_protocol.generation import ChoiceDelta, GenerationRequest, GenerationStart
from sagellm_protocol.types import (
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
)

__all__ = ["V01Requests"]


class V01Requests:
    """Runs `Request` over generations."""

    def __init__(
        self, table: RequestTable, open_request: Callable[[GenerationRequest], Awaitable[RequestEntry]]
    ) -> None:
        self._table = table
        self._open = open_request

    async def execute(self, request: Request) -> Response:
        """Run a request to its end."""
        entry = await self._begin(request)
        return await self._run(request, entry, keep=True)

    async def submit(self, request: Request) -> str:
        """Run a request in the background."""
        entry = await self._begin(request)
        entry.task = asyncio.get_running_loop().create_task(self._run(request, entry, keep=True))
        return request.request_id

    async def result(self, request_id: str, timeout_s: float | None) -> Response:
        """Wait for a request's response."""
        entry = self._table.get(request_id)
        if entry.response is None and entry.task is not None:
            done, _pending = await asyncio.wait({entry.task}, timeout=timeout_s)
            if not done:
                raise DeadlineExceededError(
                    f"request {request_id} did not end within {timeout_s:.1f} s; it goes on: ask again"
                )
        if entry.response is None:
            raise InvalidArgumentError(
                f"request {request_id!r} was streamed: its result was not kept", param="request_id"
            )
        return entry.response

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Run a request and yield its events; a failure after the start is in the end event's `error`."""
        entry = await self._begin(request)
        generation = entry.generation
        assert generation is not None
        request_id, trace_id = request.request_id, request.trace_id
        deltas: list[ChoiceDelta] = []
        status, error = RequestStatus.CANCELLED, None
        try:
            async with aclosing(generation.events()) as events:
                async for event in events:
                    if isinstance(event, GenerationStart):
                        yield StreamEventStart(
                            request_id=request_id,
                            trace_id=trace_id,
                            engine_id=event.engine_id,
                            prompt_tokens=event.prompt_tokens,
                        )
                    elif isinstance(event, ChoiceDelta):
                        deltas.append(event)
                        if event.text or event.token_ids:
                            yield StreamEventDelta(
                                request_id=request_id,
                                trace_id=trace_id,
                                engine_id=generation.engine_id,
                                content=event.text,
                                content_tokens=event.token_ids,
                            )
            status = RequestStatus.COMPLETED
        except SageError as failure:
            error = failure.to_wire()
            status = _status_of(failure)
            if generation.first_token_at is None and status is RequestStatus.FAILED:
                raise
        finally:
            generation.close()
            self._table.end(request.request_id, status, keep=False)
        whole = response_of(generation, request.trace_id, deltas, entry.wall_began, error)
        yield StreamEventEnd(
            request_id=request_id,
            trace_id=trace_id,
            engine_id=generation.engine_id,
            finish_reason=whole.finish_reason,
            content=whole.output_text,
            output_tokens=whole.output_tokens,
            prompt_tokens=whole.prompt_tokens,
            metrics=metrics_of(generation, entry.wall_began, failed=error is not None),
            error=error,
        )

    async def close(self) -> None:
        """Wait for background requests, which were cancelled."""
        tasks = [entry.task for entry in self._table.running() if entry.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self, request: Request) -> RequestEntry:
        if request.kv_budget_tokens is not None:
            raise UnsupportedError(
                "kv_budget_tokens is not supported: bound the request by max_tokens", param="kv_budget_tokens"
            )
        if request.phase is not None:
            raise UnsupportedError("phase is not supported over this call: leave it out", param="phase")
        return await self._open(request.to_generation())

    async def _run(self, request: Request, entry: RequestEntry, *, keep: bool) -> Response:
        generation = entry.generation
        assert generation is not None
        deltas: list[ChoiceDelta] = []
        status, error = RequestStatus.CANCELLED, None
        entry.status = RequestStatus.RUNNING
        try:
            async with aclosing(generation.events()) as events:
                deltas = [event async for event in events if isinstance(event, ChoiceDelta)]
            status = RequestStatus.COMPLETED
        except SageError as failure:
            error, status = failure.to_wire(), _status_of(failure)
        finally:
            generation.close()
            entry.response = response_of(
                generation, request.trace_id, deltas, entry.wall_began, error or _unless(status)
            )
            self._table.end(request.request_id, status, keep=keep)
        return entry.response


def _unless(status: RequestStatus) -> Error | None:
    """A task that was cancelled from outside has no error of its own."""
    return CancelledRequestError("the request was cancelled").to_wire() if status is RequestStatus.CANCELLED else None


def _status_of(failure: SageError) -> RequestStatus:
    return RequestStatus.CANCELLED if isinstance(failure, CancelledRequestError) else RequestStatus.FAILED
