"""The engine with the least predicted time to the first token; it must not break the pace of those that decode there."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def cost(view: ClusterView, engine: EngineView, request: RequestView, hit: int, now: float) -> float:
    """Seconds: predicted TTFT, plus what the predicted time per token exceeds its objective by, over an answer's length."""
    tokens = request.prompt_tokens + request.emitted
    ttft = engine.predicted_ttft(tokens - hit, now)
    tpot = engine.predicted_tpot(1, tokens)
    late = tpot - view.slo.tpot_s * 0.9
    return ttft if late <= 0.0 else ttft + late * 100.0


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the engine with the least predicted cost."""
    best, best_cost, best_hit = candidates[0], float("inf"), 0
    for engine in candidates:
        hit = view.hit_tokens(engine, request)
        seconds = cost(view, engine, request, hit, now)
        if seconds < best_cost:
            best, best_cost, best_hit = engine, seconds, hit
    return Decision(best, best_hit, best_cost, f"predicted {best_cost * 1000:.0f} ms")
