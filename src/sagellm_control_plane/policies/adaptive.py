"""Urgency first, fair shares within a band, and the earliest deadline among one tenant's requests; engines by routing."""

from __future__ import annotations

from sagellm_control_plane.policies.base import Policy, all_candidates
from sagellm_control_plane.view import RequestView

__all__ = ["POLICY"]


def key(request: RequestView) -> tuple[float, ...]:
    """Order by deadline where there is one, then by arrival."""
    return (request.deadline_at, request.arrived_at)


POLICY = Policy("adaptive", key, banded=True, narrow=all_candidates)
