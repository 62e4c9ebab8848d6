"""The load ledger: one lease for each attempt, taken and given back exactly once, whatever way it ends."""

from __future__ import annotations

from sagellm_control_plane.view import EngineView

__all__ = ["Lease", "Ledger", "LedgerError"]


class LedgerError(RuntimeError):
    """A lease was taken or given back twice: a bug of ours, never a state of the world."""


class Lease:
    """What one attempt occupies on its engine."""

    __slots__ = ("context_tokens", "engine", "prefill_tokens", "returned", "suspect")

    def __init__(self, engine: EngineView, prefill_tokens: int, context_tokens: int, *, suspect: bool) -> None:
        self.engine = engine
        self.prefill_tokens = prefill_tokens
        self.context_tokens = context_tokens
        self.suspect = suspect
        self.returned = False

    @property
    def prefilling(self) -> bool:
        """Whether the first token has not come yet."""
        return self.prefill_tokens > 0


class Ledger:
    """Keeps the counters of `EngineView` equal to the sum of the open leases."""

    def __init__(self) -> None:
        self.open = 0
        self.taken = 0

    def take(
        self, engine: EngineView, uncached_tokens: int, context_tokens: int, now: float, *, suspect: bool = False
    ) -> Lease:
        """Count an attempt on `engine`: `uncached_tokens` to compute, `context_tokens` in its KV once it decodes."""
        if engine.prefill_tokens == 0:
            engine.busy_since = now
        lease = Lease(engine, max(uncached_tokens, 1), context_tokens, suspect=suspect)
        engine.running += 1
        engine.prefill_tokens += lease.prefill_tokens
        engine.context_tokens += context_tokens
        if suspect:
            engine.suspects += 1
        self.open += 1
        self.taken += 1
        return lease

    def first_token(self, lease: Lease, now: float) -> None:
        """The attempt's prefill is done: it decodes from now on."""
        if lease.returned or not lease.prefilling:
            raise LedgerError(f"the lease on {lease.engine.engine_id} cannot begin to decode: given back or decoding")
        engine = lease.engine
        engine.prefill_tokens -= lease.prefill_tokens
        engine.decoding += 1
        engine.busy_since = now
        lease.prefill_tokens = 0
        self.clear_suspicion(lease)

    def clear_suspicion(self, lease: Lease) -> None:
        """The attempt made progress: it is not what kills engines."""
        if lease.suspect:
            lease.suspect = False
            lease.engine.suspects -= 1

    def give_back(self, lease: Lease) -> None:
        """The attempt has ended."""
        if lease.returned:
            raise LedgerError(f"the lease on {lease.engine.engine_id} was given back twice")
        lease.returned = True
        engine = lease.engine
        engine.running -= 1
        engine.context_tokens -= lease.context_tokens
        if lease.prefilling:
            engine.prefill_tokens -= lease.prefill_tokens
        else:
            engine.decoding -= 1
        self.clear_suspicion(lease)
        self.open -= 1
