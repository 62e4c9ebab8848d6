"""What the routes that generate text share: ids, tenants, deadlines, fan-out over prompts, echo."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from sagellm_gateway.context import Call
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.generation import (
    ChoiceDelta,
    GenerationEnd,
    GenerationRequest,
    GenerationStart,
    TokenLogprob,
    Usage,
)

__all__ = ["echoed", "extras", "generate", "merged", "now"]


def now() -> int:
    """Return the time for `created` fields, whole unix seconds."""
    return int(time.time())


def extras(call: Call, model: str | None = None) -> dict[str, Any]:
    """Return the fields of a neutral request that come from headers, the key, and the model's recommendations."""
    out: dict[str, Any] = {"trace_id": call.scope.get("sagellm.trace_id", call.request_id)}
    if model is not None:
        out["defaults"] = call.defaults(model)
    if call.principal.key_id:
        out["tenant"] = call.principal.key_id
    raw = call.headers.get(b"x-request-timeout")
    if raw is not None:
        out["deadline_s"] = _seconds(raw)
    return out


def _seconds(raw: bytes) -> float:
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise InvalidArgumentError("X-Request-Timeout must be seconds between 0 and 86400", param="x-request-timeout")
    return value


def generate(call: Call, request: GenerationRequest) -> AsyncGenerator[Any, None]:
    """Run `request`, counting its tokens for metrics, rates and budgets, also when it is broken off."""
    priority = call.scope.get("sagellm.priority")
    if priority is not None:
        request = msgspec.structs.replace(request, priority=priority)
    return _Metered(call, call.gateway.manager.generate(request))


class _Metered(AsyncGenerator[Any, None]):
    """Passes events on and counts their tokens. No generator: each of those is one more thing that the event loop keeps a list of."""

    def __init__(self, call: Call, events: AsyncGenerator[Any, None]) -> None:
        self._call = call
        self._events = events
        self._prompt = self._completion = 0

    def __anext__(self) -> Coroutine[Any, Any, Any]:
        """Return the next event, without the frame that the base class puts in between."""
        return self.asend(None)

    async def asend(self, value: None) -> Any:
        """Return the next event."""
        event = await self._events.asend(value)
        kind = type(event)
        if kind is ChoiceDelta:
            self._completion += len(event.token_ids)
        elif kind is GenerationStart:
            self._prompt = event.prompt_tokens
        else:
            self._prompt, self._completion = event.usage.prompt_tokens, event.usage.completion_tokens
            if event.ttft_s is not None and event.duration_s is not None:
                self._call.scope["sagellm.times"] = (event.ttft_s, event.duration_s)
        return event

    async def athrow(self, *error: Any) -> Any:
        """Raise an error where the request waits."""
        return await self._events.athrow(*error)

    async def aclose(self) -> None:
        """End the request, if it runs, and note its tokens."""
        try:
            await self._events.aclose()
        finally:
            self._call.used(self._prompt, self._completion)
            self._prompt = self._completion = 0


Run = Callable[[GenerationRequest], AsyncGenerator[Any, None]]


async def merged(run: Run, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Any, None]:
    """Run `requests` (prompts of one call) and merge their events: choice ``i`` of prompt ``k`` is choice ``k * n + i``."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    tasks = [asyncio.create_task(_feed(run(request), k, queue)) for k, request in enumerate(requests)]
    merge = _Merge(len(requests))
    try:
        while merge.left:
            k, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            event = merge.take(k, requests[k].n, item)
            if event is not None:
                yield event
        yield merge.end()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(source: AsyncGenerator[Any, None], k: int, queue: asyncio.Queue[Any]) -> None:
    try:
        async with contextlib.aclosing(source):
            async for event in source:
                queue.put_nowait((k, event))
    except Exception as error:  # noqa: BLE001  (carried to the consumer, which raises it)
        queue.put_nowait((k, error))


class _Merge:
    def __init__(self, prompts: int) -> None:
        self.left = prompts
        self.usage = [Usage(prompt_tokens=0, completion_tokens=0)] * prompts
        self.ttft: float | None = None
        self.began = time.monotonic()

    def take(self, k: int, n: int, event: Any) -> Any:
        if type(event) is ChoiceDelta:
            return msgspec.structs.replace(event, index=k * n + event.index)
        if type(event) is GenerationEnd:
            self.left -= 1
            self.usage[k] = event.usage
            if event.ttft_s is not None:
                self.ttft = event.ttft_s if self.ttft is None else min(self.ttft, event.ttft_s)
            return None
        return event

    def end(self) -> GenerationEnd:
        usage = Usage(
            prompt_tokens=sum(u.prompt_tokens for u in self.usage),
            completion_tokens=sum(u.completion_tokens for u in self.usage),
            cached_tokens=sum(u.cached_tokens for u in self.usage),
            reasoning_tokens=sum(u.reasoning_tokens for u in self.usage),
        )
        return GenerationEnd(usage=usage, ttft_s=self.ttft, duration_s=time.monotonic() - self.began)


async def echoed(
    call: Call, request: GenerationRequest, events: AsyncGenerator[Any, None], *, prompt_only: bool
) -> AsyncGenerator[Any, None]:
    """Put the prompt (and its log probabilities) before each choice of `request`; drop the output if `prompt_only`."""
    async with contextlib.aclosing(events):
        async for event in events:
            kind = type(event)
            if kind is GenerationStart:
                yield event
                delta = _echo(call, request, event)
                for i in range(request.n):
                    yield msgspec.structs.replace(delta, index=i)
            elif kind is ChoiceDelta and prompt_only:
                if event.finish_reason:
                    yield ChoiceDelta(index=event.index, finish_reason="length")
            elif kind is GenerationEnd and prompt_only:
                usage = msgspec.structs.replace(event.usage, completion_tokens=0)
                yield msgspec.structs.replace(event, usage=usage)
            else:
                yield event


def _echo(call: Call, request: GenerationRequest, start: GenerationStart) -> ChoiceDelta:
    prompt = request.prompt
    if isinstance(prompt, tuple):
        prompt = call.gateway.manager.chat_model(request.model).detokenize(prompt)
    entries: list[TokenLogprob] = []
    if start.prompt_logprobs is not None:
        ids = request.prompt if isinstance(request.prompt, tuple) else ()
        for i, entry in enumerate(start.prompt_logprobs):
            entries.append(entry if entry is not None else _first(call, request, ids[i] if i < len(ids) else None))
    return ChoiceDelta(text=prompt or "", logprobs=tuple(entries) if entries else None)


def _first(call: Call, request: GenerationRequest, token_id: int | None) -> TokenLogprob:
    """The first token of a prompt: nothing precedes it, so it has no probability (NaN here, null on the wire)."""
    model = call.gateway.manager.chat_model(request.model)
    if token_id is None:
        token_id = model.tokenize(request.prompt)[0]
    text = model.detokenize([token_id])
    return TokenLogprob(token_id=token_id, logprob=float("nan"), text=text, data=text.encode())
