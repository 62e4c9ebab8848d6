"""Predicted latency, and what a placement costs those that come after; the regime decides how much that counts.

The time to prefill a request's uncached part delays the request itself and everything behind it. With idle engines nothing is
behind it and only its own latency matters; the longer even the shortest queue, the more requests pay for each miss of the
prefix cache, so that keeping prefixes where they are wins over the shortest wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]

#: Most that a second of prefill is weighed for others, in units of itself.
CEILING = 3.0


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the least of predicted TTFT + weight x own prefill + lateness of the decode pace."""
    slo = view.slo
    total = request.prompt_tokens + request.emitted
    pace_limit = slo.tpot_s * 0.9
    backlogs = [engine.backlog(now) if engine.prefill_tokens else 0.0 for engine in candidates]
    shortest = min(backlogs)
    if shortest > 0.0:
        shortest = min([b / e.latency.prefill_rate for b, e in zip(backlogs, candidates, strict=True)])
    weight = min(1.0 + shortest / slo.ttft_s, CEILING)
    best, best_cost, best_hit = candidates[0], float("inf"), 0
    for engine, backlog in zip(candidates, backlogs, strict=True):
        hit = view.hit_tokens(engine, request) if request.blocks else 0
        uncached = total - hit
        latency = engine.latency
        cost = (
            latency.ttft(backlog + uncached, engine.decoding + engine.others) + weight * uncached / latency.prefill_rate
        )
        late = latency.tpot(engine.running + engine.others + 1, engine.context_tokens + total) - pace_limit
        if late > 0.0:
            cost += late * 100.0
        if cost < best_cost:
            best, best_cost, best_hit = engine, cost, hit
    return Decision(best, best_hit, best_cost, f"cost {best_cost * 1000:.0f} ms, weight {weight:.1f}")
