"""Prometheus families as plain data, and the sum of those of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from prometheus_client.core import Metric

__all__ = ["RULES", "Family", "Merged", "families_of", "merge"]

_Key = tuple[str, tuple[tuple[str, str], ...]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


RULES: dict[str, Callable[[Sequence[float]], float]] = {
    "sagellm_http_in_flight": sum,
    "sagellm_ready": min,
    "sagellm_waiting_requests": sum,
    "sagellm_engine_running": sum,
    "sagellm_engine_slots": max,
    "sagellm_engine_kv_blocks_used": max,
    "sagellm_engine_kv_blocks": max,
    "sagellm_engine_healthy": min,
    "sagellm_prefix_hit_ratio": _mean,
    "sagellm_scheduler_decision_seconds": _mean,
    "sagellm_ttft_prediction_error_seconds": _mean,
}
"""What several processes' values of a gauge are together. Counters and histograms are added."""


class Family(msgspec.Struct, array_like=True):
    """One metric: its samples are (name, labels, value)."""

    name: str
    text: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


def families_of(collector: Any) -> list[Family]:
    """Return what `collector` (a registry) holds now."""
    return [
        Family(m.name, m.documentation, m.type, [(s.name, dict(s.labels), s.value) for s in m.samples])
        for m in collector.collect()
    ]


def merge(processes: Iterable[Sequence[Family]]) -> list[Family]:
    """Return the families of all `processes` as one."""
    found: dict[str, Family] = {}
    values: dict[str, dict[_Key, list[float]]] = {}
    for families in processes:
        for family in families:
            found.setdefault(family.name, family)
            of_family = values.setdefault(family.name, {})
            for name, labels, value in family.samples:
                of_family.setdefault((name, tuple(labels.items())), []).append(value)
    return [
        Family(name, family.text, family.kind, list(_added(family, values[name]))) for name, family in found.items()
    ]


def _added(family: Family, values: dict[_Key, list[float]]) -> Iterator[tuple[str, dict[str, str], float]]:
    rule = RULES[family.name] if family.kind == "gauge" else sum
    for (name, labels), several in values.items():
        yield name, dict(labels), min(several) if name.endswith("_created") else rule(several)


class Merged:
    """A collector over families, for `prometheus_client.exposition`."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield them as `prometheus_client` wants them."""
        for family in self._families:
            metric = Metric(family.name, family.text, family.kind)
            for name, labels, value in family.samples:
                metric.add_sample(name, labels, value)
            yield metric
