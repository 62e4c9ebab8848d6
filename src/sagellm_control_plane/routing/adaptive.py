"""Notices the regime and scores accordingly: predicted latency below saturation, cache-keeping throughput above it."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


from sagellm_control_plane.routing.predicted_latency import cost


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the least predicted cost."""
    best, best_cost, best_hit = candidates[0], float("inf"), 0
    for engine in candidates:
        hit = view.hit_tokens(engine, request)
        seconds = cost(view, engine, request, hit, now)
        if seconds < best_cost:
            best, best_cost, best_hit = engine, seconds, hit
    return Decision(best, best_hit, best_cost, f"predicted {best_cost * 1000:.0f} ms")
