"""Requests of clients: let in, run over generations and embeddings, found again by their id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from sagellm_control_plane.live.adapters import Adapters
from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.engines import Engines
from sagellm_control_plane.live.generation import Generation
from sagellm_control_plane.live.requests import RequestEntry, RequestTable
from sagellm_control_plane.live.scaling import Scaling
from sagellm_control_plane.live.text_work import LONG, characters, off_loop
from sagellm_control_plane.live.v01 import V01Requests
from sagellm_control_plane.types import RequestStatus
from sagellm_control_plane.view import RequestView
from sagellm_protocol.embedding import EmbeddingRequest, EmbedRequest, EmbedResult, ScoreRequest
from sagellm_protocol.errors import CancelledRequestError, SageError, UnavailableError
from sagellm_protocol.generation import GenerationEvent, GenerationRequest
from sagellm_protocol.types import Request, Response, StreamEvent

__all__ = ["Serving"]


class Serving:
    """What `ControlPlaneManager` does with requests; its methods have the same contracts."""

    def __init__(self, dispatcher: Dispatcher, engines: Engines, adapters: Adapters, scaling: Scaling | None) -> None:
        self._dispatcher = dispatcher
        self._engines = engines
        self._adapters = adapters
        self._scaling = scaling
        self._requests = RequestTable()
        self._v01 = V01Requests(self._requests, self._begin)
        self.closed = False

    def open(self) -> None:
        """Take requests."""
        self.closed = False

    async def close(self, grace_s: float) -> None:
        """Refuse new requests, give running ones `grace_s` seconds, then cancel them."""
        self.closed = True
        if grace_s > 0.0:
            await self._requests.wait_empty(grace_s)
        for entry in self._requests.running():
            if entry.generation is not None:
                entry.generation.cancel()
        await self._v01.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Run a request: start, deltas, end."""
        if self._scaling is not None:
            await self._ensure(request.model)
        entry = await self._begin(request)
        generation = entry.generation
        assert generation is not None
        status = RequestStatus.CANCELLED
        try:
            entry.status = RequestStatus.RUNNING
            generation.open()
            while events := await generation.more():
                for event in events:
                    yield event
            status = RequestStatus.COMPLETED
        except CancelledRequestError:
            raise
        except SageError:
            status = RequestStatus.FAILED
            raise
        finally:
            generation.close()
            self._requests.end(request.request_id, status, keep=False)

    async def _begin(self, request: GenerationRequest) -> RequestEntry:
        self._refuse_when_closed()
        request = self._adapters.applied(request)
        model = self._engines.chat_model(request.model)
        # A text side without a tokenizer takes microseconds for any length.
        if getattr(model, "tokenizes", True) and characters(request) > LONG:
            prepared = await asyncio.to_thread(model.prepare, request)
        else:
            prepared = model.prepare(request)
        self._refuse_when_closed()
        entry = RequestEntry(Generation(self._dispatcher, model, prepared))
        self._requests.begin(request.request_id, entry)
        return entry

    async def _ensure(self, model: str) -> None:
        """With autoscaling, a model that nobody serves is started when it is asked for."""
        if self._scaling is not None and not self.closed:
            await self._scaling.ensure(self._adapters.base_of(model))

    def _refuse_when_closed(self) -> None:
        if self.closed:
            raise UnavailableError("the control plane is stopping: try another one", retry_after_s=1.0)

    async def execute(self, request: Request) -> Response:
        """Run a v0.1 request to its end."""
        await self._ensure(request.model)
        return await self._v01.execute(request)

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Run a v0.1 request and yield its events."""
        await self._ensure(request.model)
        async with aclosing(self._v01.stream(request)) as events:
            async for event in events:
                yield event

    async def submit(self, request: Request) -> str:
        """Run a v0.1 request in the background."""
        await self._ensure(request.model)
        return await self._v01.submit(request)

    async def result(self, request_id: str, timeout_s: float | None) -> Response:
        """Wait for a submitted request."""
        return await self._v01.result(request_id, timeout_s)

    async def embed(self, request: EmbeddingRequest) -> EmbedResult:
        """Compute vectors."""
        request = self._adapters.applied(request)
        await self._ensure(request.model)
        model = self._engines.embedding_model(request.model)
        size = sum(len(text) for text in request.inputs if isinstance(text, str))
        return await self._embed(request.model, await off_loop(size, lambda: model.prepare_embedding(request)))

    async def score(self, request: ScoreRequest) -> EmbedResult:
        """Score documents against a query."""
        request = self._adapters.applied(request)
        await self._ensure(request.model)
        model = self._engines.embedding_model(request.model)
        size = sum(len(request.query) + len(document) for document in request.documents)
        return await self._embed(request.model, await off_loop(size, lambda: model.prepare_score(request)))

    async def _embed(self, model: str, request: EmbedRequest) -> EmbedResult:
        self._refuse_when_closed()
        view = RequestView(
            request_id=request.request_id,
            model=model,
            prompt_tokens=sum(map(len, request.inputs)),
            kind="embedding",
            priority=request.priority,
            deadline_s=request.deadline_s,
            adapter=request.adapter or "",
            arrived_at=self._dispatcher.clock(),
        )
        job = self._dispatcher.open_embedding(request, view)
        try:
            return await job.result
        finally:
            self._dispatcher.close(job)

    def status_of(self, request_id: str) -> RequestStatus:
        """Return where a request stands."""
        entry = self._requests.get(request_id)
        if entry.status is RequestStatus.RUNNING and entry.generation is not None and entry.generation.waiting:
            return RequestStatus.QUEUED
        return entry.status

    def cancel(self, request_id: str) -> bool:
        """Cancel a request, queued or running; False if it is not under way."""
        entry = self._requests.find_running(request_id)
        if entry is None or entry.generation is None:
            return False
        entry.generation.cancel()
        return True
