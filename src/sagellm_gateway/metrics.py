"""Prometheus metrics with bounded labels: model names that are served, route templates, fixed outcomes. No request text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sagellm_control_plane.stats import Histogram
from sagellm_gateway.context import Call, Scope

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from sagellm_gateway.context import Gateway

__all__ = ["Metrics", "metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TPOT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0)


class _OfModel:
    __slots__ = ("completion", "prompt", "tpot", "ttft")

    def __init__(self) -> None:
        self.prompt = self.completion = 0
        self.ttft, self.tpot = Histogram(_SECONDS), Histogram(_TPOT)


class Metrics:
    """What one app counts, and its registry.

    Counted in plain numbers and put into Prometheus' form when they are asked for: a request counts eight things.
    """

    def __init__(self, gateway: Gateway) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self._gateway = gateway
        self.registry = registry = CollectorRegistry()
        registry.register(self)
        in_flight = Gauge("sagellm_http_in_flight", "Requests that run or wait.", registry=registry)
        in_flight.set_function(lambda: len(gateway.in_flight))
        ready = Gauge("sagellm_ready", "1 when new work is taken.", registry=registry)
        ready.set_function(lambda: float(gateway.ready and not gateway.draining))
        if hasattr(gateway.manager, "get_cluster_status"):
            from sagellm_gateway.plane_metrics import PlaneCollector

            registry.register(PlaneCollector(gateway.manager))
        self._models: dict[str, str] = {}
        # Bounded: templates and outcomes are fixed sets, statuses are ours, models are served ones.
        self._requests: dict[tuple[str, int, str], int] = {}
        self._latency: dict[str, Histogram] = {}
        self._of_models: dict[str, _OfModel] = {}

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        route = scope.get("sagellm.route", "unknown")
        key = (route, status, scope.get("sagellm.outcome", "ok"))
        self._requests[key] = self._requests.get(key, 0) + 1
        latency = self._latency.get(route)
        if latency is None:
            latency = self._latency[route] = Histogram(_SECONDS)
        latency.add(seconds)
        tokens = scope.get("sagellm.tokens")
        if tokens is not None:
            self._generated(self._label(scope.get("sagellm.model", "")), tokens, scope.get("sagellm.times"))

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are fixed, and a scrape must not be needed to register them."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield what was counted."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily(
            "sagellm_http_requests", "Requests by route template, status and outcome.", labels=["route", "status", "outcome"]
        )  # fmt: skip
        for (route, status, outcome), count in self._requests.items():
            requests.add_metric([route, str(status), outcome], count)
        yield requests
        tokens = CounterMetricFamily("sagellm_tokens", "Tokens by model and kind.", labels=["model", "kind"])
        for model, counts in self._of_models.items():
            tokens.add_metric([model, "prompt"], counts.prompt)
            tokens.add_metric([model, "completion"], counts.completion)
        yield tokens
        for name, text, label, histograms in (
            ("http_request_duration", "From the request's head to the last byte of its answer.", "route", self._latency),
            ("time_to_first_token", "From the request to its first token, as the control plane measured it.", "model",
             {model: counts.ttft for model, counts in self._of_models.items()}),
            ("time_per_output_token", "Mean time between output tokens of a request.", "model",
             {model: counts.tpot for model, counts in self._of_models.items()}),
        ):  # fmt: skip
            family = HistogramMetricFamily(f"sagellm_{name}_seconds", text, labels=[label])
            for value, histogram in histograms.items():
                family.add_metric([value], histogram.cumulative(), histogram.total)
            yield family

    def families(self) -> Any:
        """Return all metrics of this process as plain data."""
        import msgspec

        from sagellm_gateway.metric_families import families_of

        return msgspec.to_builtins(families_of(self.registry))

    def _generated(self, model: str, tokens: tuple[int, int], times: tuple[float, float] | None) -> None:
        counts = self._of_models.get(model)
        if counts is None:
            counts = self._of_models[model] = _OfModel()
        counts.prompt += tokens[0]
        counts.completion += tokens[1]
        if times is not None:
            ttft, duration = times
            counts.ttft.add(ttft)
            if tokens[1] > 1:
                counts.tpot.add(max(0.0, duration - ttft) / (tokens[1] - 1))

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
