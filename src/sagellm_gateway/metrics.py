"""Prometheus metrics with bounded labels: model names that are served, route templates, fixed outcomes. No request text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sagellm_gateway.context import Call, Scope

if TYPE_CHECKING:
    from sagellm_gateway.context import Gateway

__all__ = ["Metrics", "metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TPOT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """The registry of one app, and its collectors."""

    def __init__(self, gateway: Gateway) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._gateway = gateway
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "sagellm_http_requests", "Requests by route template, status and outcome.", ["route", "status", "outcome"],
            registry=registry,
        )  # fmt: skip
        self.latency = Histogram(
            "sagellm_http_request_duration_seconds", "From the request's head to the last byte of its answer.", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.ttft = Histogram(
            "sagellm_time_to_first_token_seconds", "From the request to its first token, as the control plane measured it.",
            ["model"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.tpot = Histogram(
            "sagellm_time_per_output_token_seconds", "Mean time between output tokens of a request.", ["model"],
            buckets=_TPOT, registry=registry,
        )  # fmt: skip
        self.tokens = Counter("sagellm_tokens", "Tokens by model and kind.", ["model", "kind"], registry=registry)
        in_flight = Gauge("sagellm_http_in_flight", "Requests that run or wait.", registry=registry)
        in_flight.set_function(lambda: len(gateway.in_flight))
        ready = Gauge("sagellm_ready", "1 when new work is taken.", registry=registry)
        ready.set_function(lambda: float(gateway.ready and not gateway.draining))
        if hasattr(gateway.manager, "get_cluster_status"):
            from sagellm_gateway.plane_metrics import PlaneCollector

            registry.register(PlaneCollector(gateway.manager))
        self._models: dict[str, str] = {}
        self._of_models: dict[str, tuple[Any, Any, Any, Any]] = {}
        self._children: dict[tuple[str, int, str], tuple[Any, Any]] = {}

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        route = scope.get("sagellm.route", "unknown")
        key = (route, status, scope.get("sagellm.outcome", "ok"))
        children = self._children.get(key)
        if children is None:
            # Bounded: templates and outcomes are fixed sets, statuses are ours.
            children = (self.requests.labels(route, str(status), key[2]), self.latency.labels(route))
            self._children[key] = children
        children[0].inc()
        children[1].observe(seconds)
        tokens = scope.get("sagellm.tokens")
        if tokens is not None:
            self._generated(self._label(scope.get("sagellm.model", "")), tokens, scope.get("sagellm.times"))

    def families(self) -> Any:
        """Return all metrics of this process as plain data."""
        import msgspec

        from sagellm_gateway.metric_families import families_of

        return msgspec.to_builtins(families_of(self.registry))

    def _generated(self, model: str, tokens: tuple[int, int], times: tuple[float, float] | None) -> None:
        of_model = self._of_models.get(model)
        if of_model is None:
            prompt, completion = (self.tokens.labels(model, kind) for kind in ("prompt", "completion"))
            of_model = self._of_models[model] = (prompt, completion, self.ttft.labels(model), self.tpot.labels(model))
        of_model[0].inc(tokens[0])
        of_model[1].inc(tokens[1])
        if times is not None:
            ttft, duration = times
            of_model[2].observe(ttft)
            if tokens[1] > 1:
                of_model[3].observe(max(0.0, duration - ttft) / (tokens[1] - 1))

    def _label(self, model: str) -> str:
        """Return the model's name if it was ever served; clients cannot make labels up."""
        known = self._models.get(model)
        if known is None:
            served = {str(getattr(m, "id", m)) for m in self._gateway.manager.list_models()}
            if model not in served or len(self._models) >= 1000:
                return "other"
            known = self._models[model] = model
        return known


async def metrics(call: Call) -> None:
    """GET /metrics: of all processes that share the port."""
    import msgspec
    from prometheus_client import exposition

    from sagellm_gateway.metric_families import Family, Merged, merge

    found = msgspec.convert(await call.gateway.everywhere("metrics"), list[list[Family]])
    data = exposition.generate_latest(Merged(merge(found)))
    await call.reply(data, content_type=exposition.CONTENT_TYPE_LATEST.encode())
