"""Counters and histograms of the control plane; plain numbers, read by whoever exposes them."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

__all__ = ["LATENCY_BUCKETS", "Histogram", "Stats"]

#: Seconds; from a tenth of a millisecond to two minutes.
LATENCY_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip


class Histogram:
    """Counts by upper bound; the last count is what lies above all bounds."""

    __slots__ = ("bounds", "count", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BUCKETS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.count += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return upper bounds, as text, and how many values lie at or below each: the form in which Prometheus wants it."""
        return [
            (str(bound), count) for bound, count in zip((*self.bounds, "+Inf"), accumulate(self.counts), strict=True)
        ]

    @property
    def mean(self) -> float:
        """Mean, 0 without values."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """Linear interpolation within the bucket that holds the quantile; 0 without values."""
        rank = q * self.count
        seen = 0
        low = 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and seen + count >= rank:
                return low + (bound - low) * (rank - seen) / count
            seen += count
            low = bound
        return low if self.count else 0.0


class Stats:
    """What happened since the start."""

    def __init__(self) -> None:
        self.arrived = 0
        self.decisions = 0
        self.completed = 0
        self.failed = 0
        self.cancelled = 0
        self.rejected = 0
        self.shed = 0
        self.retries = 0
        self.migrations = 0
        self.hedges = 0
        self.splits = 0
        self.poisoned = 0
        self.hung = 0
        self.prompt_tokens = 0
        self.hit_tokens = 0
        self.output_tokens = 0
        self.reasons: dict[str, dict[str, int]] = {"sheds": {}, "retries": {}, "migrations": {}}
        self.ttft = Histogram()
        self.tpot = Histogram()
        self.ttft_error = Histogram()

    def because(self, what: str, reason: str) -> None:
        """Count why something happened: one of ``sheds``, ``retries`` and ``migrations``."""
        counts = self.reasons[what]
        counts[reason] = counts.get(reason, 0) + 1

    def on_ttft(self, total_s: float, predicted_s: float, actual_s: float, *, first: bool) -> None:
        """Count a first token: since arrival, and predicted against actual since dispatch."""
        if first:
            self.ttft.add(total_s)
        self.ttft_error.add(abs(predicted_s - actual_s))

    def on_tpot(self, seconds: float) -> None:
        """Count a finished request's mean time between tokens."""
        self.tpot.add(seconds)
