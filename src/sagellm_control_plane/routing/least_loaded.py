"""The engine with the fewest requests in flight, as counted by our own ledger; ties are broken at random."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the engine with the fewest open requests."""
    fewest = min(engine.load for engine in candidates)
    ties = [engine for engine in candidates if engine.load == fewest]
    engine = ties[0] if len(ties) == 1 else ties[rng.randrange(len(ties))]
    return Decision(engine, view.hit_tokens(engine, request), float(fewest), f"{fewest} in flight")
