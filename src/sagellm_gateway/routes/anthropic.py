"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio

from sagellm_gateway.context import Call
from sagellm_gateway.dialects import anthropic
from sagellm_gateway.dialects.openai_common import Head, ignored_fields
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.routes.generation import extras, generate, now
from sagellm_gateway.streaming import guarded, stream

__all__ = ["count_tokens", "messages"]


async def messages(call: Call) -> None:
    """POST /v1/messages."""
    raw = await call.json_object()
    body = convert(raw, anthropic.MessagesBody)
    call.ignore(ignored_fields(raw, anthropic.KNOWN))
    head = Head(new_id("msg_"), now(), body.model)
    request = anthropic.request_of(body, head.id, call.gateway.config.limits, **extras(call, body.model))
    call.scope["sagellm.model"] = request.model
    events = generate(call, request)
    if body.stream:
        await stream(call, events, anthropic.MessagesFrames(head))
        return
    result = anthropic.MessagesResult()
    async with guarded(call, events) as source:
        async for event in source:
            result.add(event)
    await call.json(result.body(head))


async def count_tokens(call: Call) -> None:
    """POST /v1/messages/count_tokens."""
    raw = await call.json_object()
    body = convert(raw, anthropic.CountBody)
    call.ignore(ignored_fields(raw, anthropic.KNOWN_COUNT))
    request = anthropic.request_of(body, new_id("msg_"), call.gateway.config.limits)
    prepared = await asyncio.to_thread(call.gateway.manager.chat_model(request.model).prepare, request)
    await call.json({"input_tokens": len(prepared.engine_requests[0].prompt_token_ids)})
