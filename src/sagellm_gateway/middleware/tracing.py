"""OpenTelemetry spans that join the client's trace. Needs the extra `otel`; exporters are configured by ``OTEL_*`` variables."""

from __future__ import annotations

from typing import Any

from sagellm_gateway.context import Receive, Scope, Send
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Tracing"]

_CARRIED = (b"traceparent", b"tracestate", b"baggage")


class Tracing:
    """One server span a request, named by its route; no prompt text in it.

    Args:
        app: the layers below.
        provider: an OpenTelemetry tracer provider; None is the global one.

    Raises:
        InvalidArgumentError: OpenTelemetry is not installed.
    """

    def __init__(self, app: Any, provider: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.propagate import extract
        except ImportError:
            raise InvalidArgumentError(
                "tracing needs OpenTelemetry: pip install 'isagellm[otel]'", param="tracing"
            ) from None
        self.app = app
        self._extract = extract
        self._kind = trace.SpanKind.SERVER
        self._error = trace.Status(trace.StatusCode.ERROR)
        self._tracer = trace.get_tracer("sagellm_gateway", tracer_provider=provider)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        carrier = {k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k in _CARRIED}
        name = scope["method"]
        with self._tracer.start_as_current_span(name, context=self._extract(carrier), kind=self._kind) as span:
            scope["sagellm.trace_id"] = format(span.get_span_context().trace_id, "032x")
            await self.app(scope, receive, send)
            self._describe(span, scope)

    def _describe(self, span: Any, scope: Scope) -> None:
        route = scope.get("sagellm.route", "unknown")
        status = scope.get("sagellm.status", 0)
        span.update_name(f"{scope['method']} {route}")
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "sagellm.request_id": scope["sagellm.request_id"],
            "sagellm.outcome": scope.get("sagellm.outcome", "ok"),
        }
        if "sagellm.model" in scope:
            attributes["gen_ai.request.model"] = scope["sagellm.model"]
        tokens = scope.get("sagellm.tokens")
        if tokens is not None:
            attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"] = tokens
        if "sagellm.times" in scope:
            attributes["gen_ai.server.time_to_first_token"] = scope["sagellm.times"][0]
        span.set_attributes(attributes)
        if status >= 500:
            span.set_status(self._error)
