"""Prefix match above a threshold, else the least loaded; load wins when it is out of balance."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


MATCH = 0.5
IMBALANCE = 1.5
SLACK = 32


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Follow the prefix unless the spread of load is above both thresholds."""
    loads = [engine.load for engine in candidates]
    low, high = min(loads), max(loads)
    best = candidates[loads.index(low)]
    if high - low > SLACK and high > IMBALANCE * low:
        return Decision(best, view.hit_tokens(best, request), float(low), "out of balance: least loaded")
    hit, holder = max((view.hit_tokens(e, request), -e.load, e.engine_id) for e in candidates)[::2]
    if hit > MATCH * request.prompt_tokens:
        return Decision(view.engines[holder], hit, float(hit), f"holds {hit} tokens")
    smallest = min(candidates, key=lambda e: (view.prefix.size(e.engine_id), e.load))
    return Decision(smallest, view.hit_tokens(smallest, request), float(low), "no match: smallest cache")
