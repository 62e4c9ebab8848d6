"""Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018) on the first block of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


from sagellm_control_plane.routing.affinity import weight

BOUND = 1.25


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the first engine in the key's order whose load is below 1.25 times the mean."""
    key = request.session or (request.blocks[0].hex() if request.blocks else request.request_id)
    bound = BOUND * (sum(engine.load for engine in candidates) + 1) / len(candidates)
    ranked = sorted(candidates, key=lambda e: weight(key, e.engine_id), reverse=True)
    engine = next((e for e in ranked if e.load < bound), ranked[0])
    return Decision(engine, view.hit_tokens(engine, request), 0.0, "consistent hash, bounded load")
