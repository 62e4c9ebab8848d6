"""Whether a failed attempt is tried again: retry budget, hedge budget, and the guard against requests that kill engines."""

from __future__ import annotations

from sagellm_control_plane.config import HedgeConfig, RetryConfig
from sagellm_control_plane.events import unavailable
from sagellm_control_plane.records import Record
from sagellm_control_plane.stats import Stats
from sagellm_control_plane.view import EngineView
from sagellm_protocol.errors import Error, ErrorCode

__all__ = ["Budget", "Retries", "blame", "hedge_budget", "note_death"]

#: Failures of one death reach us one by one; those within this time of the first belong to it.
SAME_DEATH_S = 1.0


class Budget:
    """A bucket of tries that fills by a share of the arrivals (which `stats` counts), and slowly by itself."""

    __slots__ = ("_at", "_ceiling", "_ratio", "_refill", "_seen", "_stats", "_tokens", "spent")

    def __init__(self, stats: Stats, ratio: float, minimum: float, refill_per_s: float) -> None:
        self._stats = stats
        self._seen = 0
        self._ratio = ratio
        self._ceiling = max(minimum, 1.0)
        self._refill = refill_per_s
        self._tokens = minimum
        self._at = 0.0
        self.spent = 0

    def take(self, now: float) -> bool:
        """Spend one try; False when the bucket is empty."""
        arrived = self._stats.arrived
        self._tokens = min(self._tokens + (arrived - self._seen) * self._ratio, self._ceiling * 10.0)
        self._seen = arrived
        if self._tokens < self._ceiling:
            self._tokens = min(self._ceiling, self._tokens + (now - self._at) * self._refill)
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        self.spent += 1
        return True


def hedge_budget(config: HedgeConfig, stats: Stats) -> Budget:
    """Return the budget of second attempts: a share of the arrivals and nothing else."""
    return Budget(stats, config.budget_ratio, 0.0, 0.0)


def blame(engine: EngineView, now: float, *, progressed: bool, suspect: bool) -> float:
    """Return how much an engine's death speaks against one of the requests that it held.

    Call it while the request's lease is open. Fully, if it was alone there, or the only one that an earlier death had made a suspect;
    half, if it had made no progress and there were others; not at all, if it had.
    """
    note_death(engine, now)
    if engine.death_alone:
        return 1.0
    if progressed:
        return 0.0
    return 1.0 if suspect and engine.death_suspects == 1 else 0.5


def note_death(engine: EngineView, now: float) -> None:
    """Record who could be blamed at the moment of an engine's death, before its leases come back one by one."""
    if now - engine.death_at <= SAME_DEATH_S:
        return
    engine.death_at = now
    engine.death_alone = engine.running == 1
    engine.death_suspects = engine.suspects


class Retries:
    """Says whether a sequence whose attempt failed is sent on."""

    def __init__(self, config: RetryConfig, stats: Stats) -> None:
        self._config = config
        self._stats = stats
        self._budget = Budget(stats, config.budget_ratio, config.budget_min, config.budget_min / 10.0)

    def verdict(self, record: Record, error: Error, now: float) -> Error | None:
        """Return the error to tell the client, or None when the sequence is sent on."""
        request = record.request
        if not error.retryable:
            return error
        stop = self._no_more_tries(record, error, now)
        if stop is not None or request.emitted:
            if stop is None:
                self._stats.migrations += 1
                self._stats.because("migrations", error.code.value)
            return stop
        if not self._budget.take(now):
            return unavailable(f"the retry budget is spent; the attempt failed with: {error.message}", 1.0)
        self._stats.retries += 1
        self._stats.because("retries", error.code.value)
        return None

    def _no_more_tries(self, record: Record, error: Error, now: float) -> Error | None:
        """Return why a retryable failure is final for this sequence, budget aside."""
        config = self._config
        if record.suspicion >= config.poison_limit:
            self._stats.poisoned += 1
            return Error(
                code=ErrorCode.ENGINE_DIED,
                message=f"{record.tries} engines ended while they held this request: it is not sent to another one",
            )
        if record.tries >= config.max_attempts:
            if error.code is ErrorCode.RESOURCE_EXHAUSTED:
                return error  # every engine was full, none was away: that is a 429, not a 503
            return unavailable(f"{record.tries} attempts failed, the last one with: {error.message}")
        if record.request.emitted and record.request.journal == "none":
            return unavailable(f"the engine cannot continue elsewhere what it began: {error.message}")
        if record.request.deadline_at <= now:
            return Error(code=ErrorCode.DEADLINE_EXCEEDED, message="the request's deadline passed while it was retried")
        return None
