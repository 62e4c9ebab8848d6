"""Overlap of the prefix against KV pressure: most cached tokens for the least occupied memory."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the least of: blocks to compute (per prompt block) plus the share of KV memory in use plus queued prefill."""
    best, best_score, best_hit = candidates[0], float("inf"), 0
    total = max(request.prompt_tokens + request.emitted, 1)
    for engine in candidates:
        hit = view.hit_tokens(engine, request)
        capacity = engine.profile.n_blocks * engine.profile.block_size
        pressure = engine.context_tokens / capacity if capacity else engine.load / max(engine.limit, 1)
        # Beyond the capacity sequences are preempted: worse than any miss.
        overflow = 4.0 * max(0.0, pressure + total / capacity - 0.95) if capacity else 0.0
        score = (total - hit + engine.backlog(now)) / total + pressure + overflow
        if score < best_score:
            best, best_score, best_hit = engine, score, hit
    return Decision(best, best_hit, best_score, f"holds {best_hit} tokens, score {best_score:.2f}")
