"""Chat and embedding requests on one pool: embeddings fill what chat leaves free, and never take the last slots."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.policies.base import Policy
from sagellm_control_plane.view import ClusterView, EngineView, RequestView

__all__ = ["POLICY"]

CHAT_RESERVE = 0.25


def key(request: RequestView) -> tuple[float, ...]:
    """Chat before embeddings, then by arrival."""
    return (1.0 if request.kind == "embedding" else 0.0, request.arrived_at)


def narrow(
    _view: ClusterView, request: RequestView, candidates: Sequence[EngineView], _now: float
) -> Sequence[EngineView]:
    """Keep, for an embedding, the engines that leave a quarter of their slots to chat."""
    if request.kind != "embedding":
        return candidates
    return [engine for engine in candidates if engine.load < engine.limit * (1.0 - CHAT_RESERVE)]


POLICY = Policy("hybrid", key, banded=True, narrow=narrow)
