"""The cheapest engines that are predicted to meet the objective."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.policies.base import Policy
from sagellm_control_plane.view import ClusterView, EngineView, RequestView

__all__ = ["POLICY"]


def key(request: RequestView) -> tuple[float, ...]:
    """Order by arrival."""
    return (request.arrived_at,)


def narrow(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float
) -> Sequence[EngineView]:
    """Keep the cheapest engines that meet the TTFT objective; where none does, keep all."""
    meets = [
        engine for engine in candidates if engine.predicted_ttft(view.uncached(engine, request), now) <= view.slo.ttft_s
    ]
    if not meets:
        return candidates
    cheapest = min(engine.profile.cost for engine in meets)
    return [engine for engine in meets if engine.profile.cost <= cheapest]


POLICY = Policy("cost_optimized", key, banded=True, narrow=narrow)
