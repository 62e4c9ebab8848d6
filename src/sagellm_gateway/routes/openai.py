"""The OpenAI family that generates: /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.dialects import openai_chat, openai_completions
from sagellm_gateway.dialects.openai_common import Head, ignored_fields, wants_usage
from sagellm_gateway.errors import HttpError
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.resume import ResumableFrames, remaining, resume_of
from sagellm_gateway.routes.generation import echoed, extras, generate, merged, now
from sagellm_gateway.streaming import Frames, guarded, stream
from sagellm_protocol.errors import UnsupportedError
from sagellm_protocol.generation import GenerationEnd

__all__ = ["chat_completions", "completions"]


async def chat_completions(call: Call) -> None:
    """POST /v1/chat/completions."""
    raw = await call.json_object()
    body = convert(raw, openai_chat.ChatBody)
    call.ignore(ignored_fields(raw, openai_chat.KNOWN))
    wants = wants_usage(body.stream, body.stream_options)
    resume = resume_of(call, "chatcmpl-") if body.stream else None
    head = Head((resume.answer_id if resume else "") or new_id("chatcmpl-"), now(), body.model)
    asked = list(body.messages)
    if body.session_id is not None:
        body.messages = [*await _remembered(call, body.session_id), *asked]
    request = openai_chat.request_of(body, head.id, call.gateway.config.limits, **extras(call, body.model))
    call.scope["sagellm.model"] = request.model
    if resume is not None:
        request = resume.prepare(request)
    events = generate(call, request)
    if body.session_id is not None:
        events = _remembering(call, body.session_id, asked, request.n, events)
    logprobs = request.sampling.logprobs is not None
    if body.stream:
        frames: Frames = openai_chat.ChatFrames(head, request.n, usage=wants, logprobs=logprobs)
        if resume is not None:
            frames = ResumableFrames(frames, head.id, request.n, resume)
            events = remaining(events, resume.sent) if resume.answer_id else events
        await stream(call, events, frames)
        return
    result = openai_chat.ChatResult(request.n)
    async with guarded(call, events) as source:
        async for event in source:
            result.add(event)
    await call.json(result.body(head, logprobs=logprobs))


async def _remembered(call: Call, session_id: str) -> list[openai_chat.MessageWire]:
    session = await call.gateway.sessions.get(call.principal.key_id, session_id)
    if session is None:
        raise HttpError(
            404, f"the session {session_id[:64]!r} does not exist", code="session_not_found", param="session_id"
        )
    return msgspec.convert(session.messages, list[openai_chat.MessageWire])


async def _remembering(
    call: Call, session_id: str, asked: list[openai_chat.MessageWire], n: int, events: AsyncGenerator[Any, None]
) -> AsyncGenerator[Any, None]:
    """Pass `events` on; what was asked and the first choice are in the session before the last event goes out."""
    result = openai_chat.ChatResult(n)
    async with contextlib.aclosing(events):
        async for event in events:
            result.add(event)
            if type(event) is GenerationEnd:
                turns = [{k: v for k, v in msgspec.to_builtins(m).items() if v is not None} for m in asked]
                await call.gateway.sessions.append(call.principal.key_id, session_id, [*turns, result.message(0)])
            yield event


async def completions(call: Call) -> None:
    """POST /v1/completions."""
    raw = await call.json_object()
    body = convert(raw, openai_completions.CompletionBody)
    call.ignore(ignored_fields(raw, openai_completions.KNOWN))
    wants = wants_usage(body.stream, body.stream_options)
    resume = resume_of(call, "cmpl-") if body.stream else None
    head = Head((resume.answer_id if resume else "") or new_id("cmpl-"), now(), body.model)
    requests = openai_completions.requests_of(body, head.id, call.gateway.config.limits, **extras(call, body.model))
    call.scope["sagellm.model"] = body.model
    if resume is not None:
        if len(requests) > 1:
            raise UnsupportedError("a stream of several prompts cannot be resumed: send one at a time", param="prompt")
        requests = [resume.prepare(requests[0])]
    events = _events(call, body, requests)
    choices, logprobs = len(requests) * requests[0].n, body.logprobs is not None
    if body.stream:
        frames: Frames = openai_completions.CompletionFrames(head, choices, usage=wants, logprobs=logprobs)
        if resume is not None:
            frames = ResumableFrames(frames, head.id, choices, resume)
            events = remaining(events, resume.sent) if resume.answer_id else events
        await stream(call, events, frames)
        return
    result = openai_completions.CompletionResult(choices)
    async with guarded(call, events) as source:
        async for event in source:
            result.add(event)
    await call.json(result.body(head, logprobs=logprobs))


def _events(call: Call, body: openai_completions.CompletionBody, requests: list[Any]) -> AsyncGenerator[Any, None]:
    only = openai_completions.scores_only(body)

    def run(request: Any) -> AsyncGenerator[Any, None]:
        events = generate(call, request)
        return echoed(call, request, events, prompt_only=only) if body.echo else events

    return run(requests[0]) if len(requests) == 1 else merged(run, requests)
