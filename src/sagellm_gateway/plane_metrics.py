"""What the control plane knows, as Prometheus metrics; read when it is scraped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

__all__ = ["PlaneCollector"]

_ENGINE = {
    "sagellm_engine_running": ("active_requests", "Requests on the engine."),
    "sagellm_engine_slots": ("max_concurrent_requests", "Requests that the engine takes at the same time."),
    "sagellm_engine_kv_blocks_used": ("kv_blocks_used", "KV blocks in use."),
    "sagellm_engine_kv_blocks": ("kv_blocks_total", "KV blocks."),
    "sagellm_engine_healthy": ("is_healthy", "1 when the engine gets new requests."),
}
_COUNTERS = {
    "sagellm_scheduler_decisions": ("decisions", "Requests placed on an engine."),
    "sagellm_scheduler_retries": ("retries", "Attempts that failed before the first token and went to another engine."),
    "sagellm_scheduler_migrations": ("migrations", "Streams that went on on another engine."),
    "sagellm_scheduler_hedges": ("hedges", "Requests that were sent to a second engine because the first was late."),
    "sagellm_scheduler_sheds": ("sheds", "Requests refused for overload."),
    "sagellm_scheduler_poisoned": ("poisoned", "Requests failed because engines died under them."),
}
_GAUGES = {
    "sagellm_prefix_hit_ratio": ("prefix_hit_rate", 1.0, "Share of prompt tokens found in a prefix cache."),
    "sagellm_scheduler_decision_seconds": ("mean_decision_us", 1e-6, "Mean time of a placement decision."),
    "sagellm_ttft_prediction_error_seconds": ("ttft_prediction_error", 1.0, "Mean error of the predicted TTFT."),
}


_HISTOGRAMS = {
    "sagellm_added_seconds": ("added", "What the control plane itself adds to the time to the first token."),
    "sagellm_ttft_prediction_error_distribution_seconds": ("ttft_error", "Predicted against actual TTFT."),
}


class PlaneCollector:
    """Collector over a `ControlPlaneManager`. Labels are ids of registered engines and names of served models."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are fixed, and a scrape must not be needed to register them."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of now."""
        cluster = self._manager.get_cluster_status()
        for name, (field, text) in _ENGINE.items():
            family = GaugeMetricFamily(name, text, labels=["model", "engine"])
            for model, rows in cluster["models"].items():
                for row in rows:
                    family.add_metric([model, row["instance_id"]], float(row[field]))
            yield family
        waiting = GaugeMetricFamily("sagellm_waiting_requests", "Requests that wait for an engine.", labels=["model"])
        for model, count in cluster["waiting"].items():
            waiting.add_metric([model], count)
        yield waiting
        scheduling = self._manager.get_scheduling_metrics()
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(scheduling, field))
        for name, (field, scale, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(scheduling, field) * scale)
        reasons = CounterMetricFamily(
            "sagellm_scheduler_reasons", "Why requests were shed, retried or moved.", labels=["what", "reason"]
        )
        for what, counts in scheduling.reasons.items():
            for reason, count in counts.items():
                reasons.add_metric([what, reason], count)
        yield reasons
        histograms = self._manager.histograms()
        for name, (field, text) in _HISTOGRAMS.items():
            found = histograms[field]
            yield HistogramMetricFamily(name, text, buckets=found.cumulative(), sum_value=found.total)
