"""Real prefix locality: the longest cached prefix, unless its owner's wait is beyond the budget."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the engine that holds most of the prompt, ties to the shortest predicted wait.

    An owner is passed over when waiting for it takes longer than half the TTFT objective more than the best alternative.
    """
    scored = [(view.hit_tokens(engine, request), engine) for engine in candidates]
    total = request.prompt_tokens + request.emitted
    waits = [engine.predicted_ttft(total - hit, now) for hit, engine in scored]
    budget = min(waits) + 0.5 * view.slo.ttft_s
    best = -1
    for i, (hit, _engine) in enumerate(scored):
        if waits[i] <= budget and (best < 0 or (hit, -waits[i]) > (scored[best][0], -waits[best])):
            best = i
    hit, engine = scored[best]
    return Decision(engine, hit, float(hit), f"holds {hit} tokens")
