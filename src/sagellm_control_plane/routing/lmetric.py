"""LMetric: tokens to prefill times sequences to decode beside. No weights to tune."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the engine with the least product of uncached prefill (queued and own) and decode load."""
    best, best_score, best_hit = candidates[0], float("inf"), 0
    total = request.prompt_tokens + request.emitted
    for engine in candidates:
        hit = view.hit_tokens(engine, request)
        score = (engine.backlog(now) + total - hit) * (engine.load + 1)
        if score < best_score:
            best, best_score, best_hit = engine, score, hit
    return Decision(best, best_hit, best_score, "least prefill x decode")
