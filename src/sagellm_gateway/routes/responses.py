"""The Responses API: create (plain, streamed, in the background), get, delete, cancel, input items."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from sagellm_gateway.context import Call
from sagellm_gateway.dialects import openai_responses as dialect
from sagellm_gateway.dialects.openai_common import ignored_fields
from sagellm_gateway.dialects.responses_builder import ResponseBuilder, event_bytes, response_of_item
from sagellm_gateway.errors import HttpError
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.routes.generation import extras, generate, now
from sagellm_gateway.store.responses import StoredResponse
from sagellm_gateway.streaming import guarded, stream
from sagellm_protocol.errors import (
    CancelledRequestError,
    InternalError,
    InvalidArgumentError,
    SageError,
    UnsupportedError,
)
from sagellm_protocol.generation import ChoiceDelta, GenerationEnd, GenerationRequest, GenerationStart

__all__ = ["BackgroundRun", "cancel", "create", "delete", "get", "input_items", "input_tokens"]

log = logging.getLogger("sagellm_gateway")

_MAX_CHAIN = 1000
_KEPT_LOGS = 256


class EventFrames:
    """Writes the events that a `ResponseBuilder` made; None is the end of a stream that went well."""

    content_type = b"text/event-stream; charset=utf-8"
    ping = b": ping\n\n"

    def __init__(self, builder: ResponseBuilder) -> None:
        self._builder = builder

    def start(self, event: Any) -> bytes:
        """Not used: the source yields events of its own."""
        return self.end(event)

    def delta(self, event: Any) -> bytes:
        """Not used: the source yields events of its own."""
        return self.end(event)

    def end(self, event: Any) -> bytes:
        """One event, or the terminator."""
        return b"data: [DONE]\n\n" if event is None else event_bytes(event)

    def error(self, error: SageError) -> bytes:
        """An error event and response.failed; no terminator follows."""
        return b"".join(event_bytes(e) for e in self._builder.error(error))


class BackgroundRun:
    """A response that is made whether or not anybody listens. Listeners replay its events from any number on."""

    def __init__(self, builder: ResponseBuilder) -> None:
        self.builder = builder
        self.events: list[dict[str, Any]] = []
        self.task: asyncio.Task[None] | None = None
        self.done = False
        self._news = asyncio.Event()

    def publish(self, events: list[dict[str, Any]]) -> None:
        """Add events and wake listeners."""
        self.events += events
        self._news.set()
        self._news = asyncio.Event()

    def finish(self) -> None:
        """No more events will come."""
        self.done = True
        self._news.set()

    async def stop(self) -> None:
        """Cancel what is still being made; it is stored as it stands."""
        if self.task is not None and not self.done:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def listen(self, after: int) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events with a number above `after`, then those to come."""
        position = after + 1
        while True:
            while position < len(self.events):
                yield self.events[position]
                position += 1
            if self.done:
                return
            await self._news.wait()


async def create(call: Call) -> None:
    """POST /v1/responses."""
    raw = await call.json_object()
    for name, reason in dialect.REFUSED.items():
        if raw.get(name):
            raise UnsupportedError(f"{name} is not supported: {reason}", param=name)
    body = convert(raw, dialect.ResponsesBody)
    call.ignore(ignored_fields(raw, dialect.KNOWN))
    if body.background and body.store is False:
        raise InvalidArgumentError("background needs store: true, or nobody could fetch the answer", param="store")
    own = await _own(call, body)
    history = await _history(call, body.previous_response_id)
    response_id = new_id("resp_")
    request = dialect.request_of(
        body, [*history, *own], response_id, call.gateway.config.limits, **extras(call, body.model)
    )
    call.scope["sagellm.model"] = request.model
    builder = ResponseBuilder(body, request, now())
    if body.background:
        await _in_background(call, body, builder, request, own)
        return
    events = generate(call, request)
    if body.stream:
        await stream(call, _built(call, events, builder, own), EventFrames(builder))
        return
    builder.created()
    async with guarded(call, events) as source:
        async for event in source:
            _take(builder, event)
    if body.store is not False:
        await _save(call, builder, own)
    await call.json(builder.response)


def _take(builder: ResponseBuilder, event: Any) -> list[dict[str, Any]]:
    if type(event) is ChoiceDelta:
        return builder.delta(event)
    if type(event) is GenerationEnd:
        return builder.end(event, now())
    return builder.start(event)


async def _built(
    call: Call, events: AsyncGenerator[Any, None], builder: ResponseBuilder, own: list[dict[str, Any]]
) -> AsyncGenerator[Any, None]:
    """Yield the response's events; it is stored before its last event is sent, so that a client can fetch it at once."""
    async with contextlib.aclosing(events):
        async for event in events:
            if type(event) is GenerationStart:
                for made in builder.created():
                    yield made
            made_now = _take(builder, event)
            if type(event) is GenerationEnd and builder.response["store"]:
                await _save(call, builder, own)
            for made in made_now:
                yield made
    yield None


async def _save(call: Call, builder: ResponseBuilder, own: list[dict[str, Any]]) -> None:
    body = builder.response
    stored = StoredResponse(id=body["id"], body=body, input=own, previous=body["previous_response_id"])
    await call.gateway.responses.put(call.principal.key_id, stored)


async def _own(call: Call, body: dialect.ResponsesBody) -> list[dict[str, Any]]:
    """Return the request's own items, each reference to an output item of a stored response replaced by that item."""
    items = dialect.input_items(body)
    for i, item in enumerate(items):
        if item["type"] == "item_reference":
            items[i] = await _referred(call, item["id"], f"input[{i}]")
    return items


async def _referred(call: Call, item_id: str, where: str) -> dict[str, Any]:
    stored = await call.gateway.responses.get(call.principal.key_id, response_of_item(item_id))
    for item in stored.body["output"] if stored is not None else ():
        if item["id"] == item_id:
            return dict(item)
    raise HttpError(
        404,
        f"{where} refers to the item {item_id[:64]!r}, which is not stored here",
        code="item_not_found",
        param=where,
    )


async def _history(call: Call, previous: str | None) -> list[dict[str, Any]]:
    """Return the items of the chain of responses that ends with `previous`, oldest first."""
    chain: list[list[dict[str, Any]]] = []
    current = previous
    while current is not None:
        stored = await call.gateway.responses.get(call.principal.key_id, current)
        if stored is None:
            raise HttpError(
                404 if current == previous else 400,
                f"the response {current[:64]!r} is not stored here",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        chain.append([*stored.input, *stored.body["output"]])
        current = stored.previous
        if len(chain) > _MAX_CHAIN:
            raise InvalidArgumentError(f"the chain has more than {_MAX_CHAIN} responses", param="previous_response_id")
    return [item for items in reversed(chain) for item in items]


# -- background ----------------------------------------------------------------------------------------------------


async def _in_background(
    call: Call,
    body: dialect.ResponsesBody,
    builder: ResponseBuilder,
    request: GenerationRequest,
    own: list[dict[str, Any]],
) -> None:
    call.gateway.admit()
    call.gateway.manager.chat_model(request.model)
    run = BackgroundRun(builder)
    builder.response["status"] = "queued"
    run.publish(builder.created() + builder.queued())
    await _save(call, builder, own)
    runs = call.gateway.background
    runs[request.request_id] = run
    run.task = asyncio.create_task(_work(call, run, request, own))
    if body.stream:
        await stream(call, _replay(run, -1), EventFrames(builder))
        return
    await call.json(builder.response)


async def _work(call: Call, run: BackgroundRun, request: GenerationRequest, own: list[dict[str, Any]]) -> None:
    builder = run.builder
    try:
        async with contextlib.aclosing(generate(call, request)) as events:
            async for event in events:
                run.publish(_take(builder, event))
                if type(event) is GenerationStart:
                    await _save(call, builder, own)
    except asyncio.CancelledError:
        run.publish(builder.cancel(CancelledRequestError("the response was cancelled")))
    except SageError as error:
        run.publish(builder.error(error))
    except Exception as error:  # a task's border: the response fails, the log has the rest
        log.exception("request %s failed", call.request_id)
        run.publish(builder.error(InternalError(type(error).__name__)))
    finally:
        await _save(call, builder, own)
        run.finish()
        _forget_old(call.gateway.background)


def _forget_old(runs: dict[str, BackgroundRun]) -> None:
    """Keep the event logs of the last runs only; whoever comes later finds the stored response."""
    done = [response_id for response_id, run in runs.items() if run.done]
    for response_id in done[: max(0, len(done) - _KEPT_LOGS)]:
        del runs[response_id]


async def _replay(run: BackgroundRun, after: int) -> AsyncGenerator[Any, None]:
    async with contextlib.aclosing(run.listen(after)) as events:
        async for event in events:
            yield event
    if run.builder.response["status"] in ("completed", "incomplete"):
        yield None


async def _stored(call: Call) -> StoredResponse:
    response_id = call.path("response")
    stored = await call.gateway.responses.get(call.principal.key_id, response_id)
    if stored is None:
        raise HttpError(
            404, f"the response {response_id[:64]!r} is not stored here", code="not_found", param="response_id"
        )
    return stored


async def get(call: Call) -> None:
    """GET /v1/responses/{id}; ``stream=true`` follows a background response, from ``starting_after`` on."""
    stored = await _stored(call)
    query = call.query()
    if query.get("stream", "").lower() != "true":
        await call.json(stored.body)
        return
    run = call.gateway.background.get(stored.id)
    if run is None:
        raise InvalidArgumentError(
            "only a background response of the last minutes can be streamed again", param="stream"
        )
    after = query.get("starting_after", "-1")
    if not after.removeprefix("-").isdigit():
        raise InvalidArgumentError("starting_after must be a sequence number", param="starting_after")
    await stream(call, _replay(run, max(-1, int(after[:12]))), EventFrames(run.builder))


async def delete(call: Call) -> None:
    """DELETE /v1/responses/{id}."""
    stored = await _stored(call)
    run = call.gateway.background.get(stored.id)
    if run is not None and not run.done:
        raise InvalidArgumentError("the response is still being made: cancel it first", param="response_id")
    await call.gateway.responses.delete(call.principal.key_id, stored.id)
    await call.json({"id": stored.id, "object": "response.deleted", "deleted": True})


async def cancel(call: Call) -> None:
    """POST /v1/responses/{id}/cancel: background responses only."""
    stored = await _stored(call)
    if not stored.body["background"]:
        raise InvalidArgumentError("only a background response can be cancelled", param="response_id")
    run = call.gateway.background.get(stored.id)
    if run is not None and not run.done:
        await run.stop()
        stored = await _stored(call)
    await call.json(stored.body)


async def input_items(call: Call) -> None:
    """GET /v1/responses/{id}/input_items: newest first unless ``order=asc``; ``limit`` and ``after`` page."""
    stored = await _stored(call)
    query = call.query()
    raw_limit = query.get("limit", "20")
    if not raw_limit.isdigit() or not 1 <= int(raw_limit[:6]) <= 100:
        raise InvalidArgumentError("limit must be 1 to 100", param="limit")
    if query.get("order", "desc") not in ("asc", "desc"):
        raise InvalidArgumentError("order must be asc or desc", param="order")
    history = await _history(call, stored.previous)
    items = [*history, *stored.input]
    if query.get("order", "desc") == "desc":
        items.reverse()
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidArgumentError("after is not the id of an item of this response", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(raw_limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(items) > len(page)
    await call.json({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


async def input_tokens(call: Call) -> None:
    """POST /v1/responses/input_tokens: what the prompt would cost."""
    raw = await call.json_object()
    body = convert(raw, dialect.ResponsesBody)
    items = [*await _history(call, body.previous_response_id), *await _own(call, body)]
    request = dialect.request_of(body, items, new_id("resp_"), call.gateway.config.limits)
    prepared = await asyncio.to_thread(call.gateway.manager.chat_model(request.model).prepare, request)
    count = len(prepared.engine_requests[0].prompt_token_ids)
    await call.json({"object": "response.input_tokens", "input_tokens": count})
