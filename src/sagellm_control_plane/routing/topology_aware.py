"""The nearest engine by zone (region/host/socket) among those whose predicted wait is within the budget."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def shared_parts(a: str, b: str) -> int:
    """Leading parts that two zones share."""
    count = 0
    for x, y in zip(a.split("/"), b.split("/"), strict=False):
        if x != y or not x:
            break
        count += 1
    return count


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the engine that shares most of the request's zone, ties to the shortest predicted wait."""
    waits = [engine.predicted_ttft(view.uncached(engine, request), now) for engine in candidates]
    budget = min(waits) + 0.5 * view.slo.ttft_s
    near = [
        (shared_parts(request.zone, engine.profile.zone), -wait, -i)
        for i, (engine, wait) in enumerate(zip(candidates, waits, strict=True))
        if wait <= budget
    ]
    shared, _wait, index = max(near)
    engine = candidates[-index]
    return Decision(engine, view.hit_tokens(engine, request), float(shared), f"{shared} parts of the zone shared")
