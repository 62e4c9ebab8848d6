"""Earliest deadline first, on the engine with the least headroom that is still enough (best fit).

Best fit keeps the fast engines free for the requests that need them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.policies.base import Policy
from sagellm_control_plane.view import ClusterView, EngineView, RequestView

__all__ = ["POLICY"]


def key(request: RequestView) -> tuple[float, ...]:
    """Order by deadline, then by arrival."""
    return (request.deadline_at, request.arrived_at)


def narrow(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float
) -> Sequence[EngineView]:
    """Keep the engine with the least positive headroom; where none has any, keep all."""
    budget = min(request.deadline_at, request.arrived_at + view.slo.ttft_s) - now
    tokens = request.prompt_tokens + request.emitted
    fits: list[tuple[float, int]] = []
    for i, engine in enumerate(candidates):
        headroom = budget - engine.predicted_ttft(view.uncached(engine, request), now)
        # A fifth of the budget stays free for the error of the prediction.
        if headroom > 0.2 * budget and engine.predicted_tpot(1, tokens) <= view.slo.tpot_s:
            fits.append((headroom, i))
    return [candidates[min(fits)[1]]] if fits else candidates


POLICY = Policy("slo_aware", key, banded=True, narrow=narrow)
