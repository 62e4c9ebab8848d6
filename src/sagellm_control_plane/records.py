"""The sequences that have not ended: their attempts, and what is counted when they end."""

from __future__ import annotations

from sagellm_control_plane.fairness import TokenCounters
from sagellm_control_plane.ledger import Lease, Ledger
from sagellm_control_plane.stats import Stats
from sagellm_control_plane.view import ClusterView, RequestView
from sagellm_protocol.errors import Error

__all__ = ["Attempt", "Record", "Records"]


class Attempt:
    """One dispatch of a sequence to an engine."""

    __slots__ = (
        "ahead_tokens",
        "at",
        "context",
        "decoding",
        "first_at",
        "hedge",
        "lease",
        "predicted",
        "prefill",
        "sequences",
    )

    def __init__(
        self, lease: Lease, prefill: Lease | None, at: float, predicted: float, ahead_tokens: float, *, hedge: bool
    ) -> None:
        self.lease = lease
        self.prefill = prefill
        self.at = at
        self.predicted = predicted
        self.ahead_tokens = ahead_tokens
        self.decoding = (prefill or lease).engine.decoding
        self.first_at: float | None = None
        self.hedge = hedge
        self.sequences = 0
        self.context = 0

    def return_leases(self, ledger: Ledger) -> None:
        """The attempt is over: whatever it holds comes back."""
        ledger.give_back(self.lease)
        self.return_prefill(ledger)

    def return_prefill(self, ledger: Ledger) -> None:
        """The prompt has been computed (or will not be)."""
        if self.prefill is not None:
            ledger.give_back(self.prefill)
            self.prefill = None


class Record:
    """One sequence from arrival to its end."""

    __slots__ = ("attempts", "first_at", "last_error", "queued_at", "request", "suspicion", "tries")

    def __init__(self, request: RequestView) -> None:
        self.request = request
        self.attempts: dict[int, Attempt] = {}
        self.tries = 0
        self.suspicion = 0.0
        self.first_at: float | None = None
        self.queued_at: float | None = None
        self.last_error: Error | None = None


class Records:
    """Sequences by id, and how many of each model arrived and ended."""

    def __init__(self, view: ClusterView, counters: TokenCounters, stats: Stats) -> None:
        self._view = view
        self._counters = counters
        self._stats = stats
        self._open: dict[str, Record] = {}
        self._arrived: dict[str, int] = {}
        self._ended: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __getitem__(self, request_id: str) -> Record:
        return self._open[request_id]

    def find(self, request_id: str) -> Record | None:
        """Return a sequence that has not ended, or None."""
        return self._open.get(request_id)

    def all(self) -> list[Record]:
        """All sequences that have not ended."""
        return list(self._open.values())

    def arrivals_of(self, model: str) -> tuple[int, int]:
        """Sequences of a model that arrived, and that ended, since the start."""
        return self._arrived.get(model, 0), self._ended.get(model, 0)

    def arrived(self, request: RequestView) -> Record:
        """Count a sequence that arrived; it is kept from `keep` on."""
        self._stats.arrived += 1
        self._arrived[request.model] = self._arrived.get(request.model, 0) + 1
        return Record(request)

    def keep(self, record: Record) -> None:
        """The sequence was let in."""
        self._open[record.request.request_id] = record

    def drop(self, request_id: str) -> None:
        """The sequence was refused after all: it counts as never let in."""
        del self._open[request_id]

    def end(self, record: Record, output_tokens: int) -> None:
        """The sequence has ended, well or badly, with so many tokens."""
        request = record.request
        del self._open[request.request_id]
        self._ended[request.model] = self._ended.get(request.model, 0) + 1
        self._counters.charge(request.tenant, 0, output_tokens)
        self._stats.output_tokens += output_tokens
        means = self._view.output_tokens
        means[request.model] = means.get(request.model, float(output_tokens)) * 0.98 + output_tokens * 0.02
