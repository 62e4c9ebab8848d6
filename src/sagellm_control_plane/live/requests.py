"""Requests by id: which are under way, and what became of those that ended."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence

from sagellm_control_plane.live.generation import Generation
from sagellm_control_plane.types import RequestStatus
from sagellm_protocol.errors import Error, InvalidArgumentError
from sagellm_protocol.generation import ChoiceDelta
from sagellm_protocol.metrics import Metrics, Timestamps
from sagellm_protocol.types import Response

__all__ = ["RequestEntry", "RequestTable", "response_of"]


class RequestEntry:
    """One request, running or done."""

    __slots__ = ("error", "generation", "response", "status", "task", "wall_began")

    def __init__(self, generation: Generation | None = None) -> None:
        self.generation = generation
        self.status = RequestStatus.QUEUED
        self.response: Response | None = None
        self.error: Error | None = None
        self.task: asyncio.Task[Response] | None = None
        self.wall_began = time.time()


class RequestTable:
    """Requests under way, and a bounded number of finished ones, oldest forgotten first."""

    def __init__(self, keep: int = 4096) -> None:
        self._keep = keep
        self._running: dict[str, RequestEntry] = {}
        self._done: OrderedDict[str, RequestEntry] = OrderedDict()
        self._empty = asyncio.Event()

    def begin(self, request_id: str, entry: RequestEntry) -> None:
        """Take in a request.

        Raises:
            InvalidArgumentError: a request of that id is under way.
        """
        if request_id in self._running:
            raise InvalidArgumentError(
                f"request_id {request_id!r} is in use by a running request: choose another one", param="request_id"
            )
        self._running[request_id] = entry

    def end(self, request_id: str, status: RequestStatus, *, keep: bool) -> None:
        """A request ended; `keep` when somebody will ask for its result."""
        entry = self._running.pop(request_id, None)
        if entry is None:
            return
        if not self._running:
            self._empty.set()
        entry.status = status
        entry.generation = None
        if keep:
            self._done[request_id] = entry
            while len(self._done) > self._keep:
                self._done.popitem(last=False)

    def get(self, request_id: str) -> RequestEntry:
        """Return a request.

        Raises:
            InvalidArgumentError: no such request, or it ended long ago.
        """
        entry = self._running.get(request_id) or self._done.get(request_id)
        if entry is None:
            raise InvalidArgumentError(
                f"request {request_id!r} is unknown: the last {self._keep} results are kept", param="request_id"
            )
        return entry

    async def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; False when the time is over first."""
        if not self._running:
            return True
        self._empty.clear()
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def running(self) -> list[RequestEntry]:
        """Requests under way."""
        return list(self._running.values())

    def find_running(self, request_id: str) -> RequestEntry | None:
        """Return a request that is under way, or None."""
        return self._running.get(request_id)


def response_of(
    generation: Generation,
    trace_id: str,
    deltas: Sequence[ChoiceDelta],
    wall_began: float,
    error: Error | None = None,
) -> Response:
    """Return a v0.1 response of a finished generation of one choice."""
    reason = next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None)
    if error is not None or reason is None:
        reason = "cancelled" if error is not None and error.code == "cancelled" else "error"
    usage = generation.usage()
    return Response(
        request_id=generation.request.request_id,
        trace_id=trace_id,
        output_text="".join(delta.text for delta in deltas),
        output_tokens=tuple(token for sequence in generation.sequences for token in sequence.journal),
        prompt_tokens=usage.prompt_tokens,
        finish_reason=reason,
        metrics=metrics_of(generation, wall_began, failed=error is not None),
        error=error,
    )


def metrics_of(generation: Generation, wall_began: float, *, failed: bool = False) -> Metrics:
    """Return what a generation cost, as measured here: milliseconds from its arrival."""
    usage = generation.usage()
    end = generation.ended_at or time.monotonic()
    first = generation.first_token_at
    total = max(end - generation.began, 1e-9)
    decode = end - first if first is not None else 0.0
    gaps = max(usage.completion_tokens - 1, 0)
    tpot = decode / gaps * 1000.0 if gaps else 0.0
    return Metrics(
        ttft_ms=(first - generation.began) * 1000.0 if first is not None else total * 1000.0,
        tpot_ms=tpot,
        throughput_tps=usage.completion_tokens / total,
        peak_mem_mb=generation.engine_rss_bytes() / 2**20,
        error_rate=1.0 if failed else 0.0,
        kv_used_tokens=usage.prompt_tokens + usage.completion_tokens,
        prefix_hit_rate=usage.cached_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0,
        prefill_ms=(first - generation.began) * 1000.0 if first is not None else 0.0,
        decode_ms=decode * 1000.0,
        timestamps=Timestamps(
            queued_at=wall_began,
            scheduled_at=wall_began + generation.waited_s,
            executed_at=None if first is None else wall_began + (first - generation.began),
            completed_at=wall_began + total,
        ),
    )
