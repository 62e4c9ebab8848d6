"""The outermost layer: request id, trace id, status of the answer, one log line, what an answer's head always holds."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any

from sagellm_gateway.context import Gateway, Message, Receive, Scope, Send
from sagellm_gateway.errors import HttpError, Shape, openai_body, render
from sagellm_gateway.ids import new_id
from sagellm_protocol.errors import SageError

__all__ = ["Edge", "refuse"]

access = logging.getLogger("sagellm_gateway.access")

_ID = re.compile(rb"^[\x21-\x7e]{1,128}$")
_TRACEPARENT = re.compile(rb"^00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$")

Observer = Callable[[Scope, int, float], None]


class Edge:
    """Gives each request an id (the client's own ``X-Request-Id`` where it has a sane one) and tells observers its end."""

    def __init__(self, app: Any, gateway: Gateway, observers: tuple[Observer, ...] = ()) -> None:
        self.app = app
        self.gateway = gateway
        self.observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0
        problem = _identify(scope, self.gateway)
        request_id = scope["sagellm.request_id"].encode()
        # OpenAI's clients read x-request-id, Anthropic's request-id.
        fixed = [(b"x-request-id", request_id), (b"request-id", request_id), (b"x-content-type-options", b"nosniff")]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = scope["sagellm.status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), *fixed]
            await send(message)

        try:
            if problem is None:
                await self.app(scope, receive, answer)
            else:
                await refuse(problem, scope, answer)
        finally:
            seconds = time.perf_counter() - began
            if self.gateway.config.access_log and access.isEnabledFor(logging.INFO):
                _log(scope, status, seconds)
            for observe in self.observers:
                observe(scope, status, seconds)


def _identify(scope: Scope, gateway: Gateway) -> HttpError | None:
    """Set the ids in `scope`; return why the request's head is refused, or None."""
    sent = trace = None
    headers = scope["headers"]
    size = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") + 4 * len(headers)
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"x-request-id":
            sent = value
        elif name == b"traceparent":
            trace = _TRACEPARENT.match(value)
    good = sent is not None and _ID.match(sent)
    scope["sagellm.request_id"] = sent.decode() if sent is not None and good else new_id("req_")
    if trace is not None:
        scope["sagellm.trace_id"] = trace[1].decode()
    limits = gateway.config.limits
    if sent is not None and not good:
        return HttpError(
            400, "X-Request-Id must be 1 to 128 printable ASCII characters", code="invalid_header", param="x-request-id"
        )
    if len(headers) > limits.headers:
        return HttpError(431, f"{len(headers)} header lines, the most is {limits.headers}", code="headers_too_large")
    if size > limits.header_bytes:
        return HttpError(431, f"{size} bytes of headers, the most is {limits.header_bytes}", code="headers_too_large")
    return None


async def refuse(error: SageError, scope: Scope, send: Send, shape: Shape = openai_body) -> None:
    """Answer with `error` outside of an endpoint."""
    status, headers, body = render(error, shape, scope["sagellm.request_id"])
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _log(scope: Scope, status: int, seconds: float) -> None:
    principal = scope.get("sagellm.principal")
    access.info(
        "%s %s %s %d %.1fms",
        scope["sagellm.request_id"],
        scope["method"],
        scope.get("sagellm.route", "-"),
        status,
        seconds * 1e3,
        extra={
            "request_id": scope["sagellm.request_id"],
            "trace_id": scope.get("sagellm.trace_id", ""),
            "method": scope["method"],
            "route": scope.get("sagellm.route", ""),
            "status": status,
            "duration_ms": round(seconds * 1e3, 3),
            "model": scope.get("sagellm.model", ""),
            "outcome": scope.get("sagellm.outcome", "ok"),
            "key_id": principal.key_id if principal is not None else "",
        },
    )
