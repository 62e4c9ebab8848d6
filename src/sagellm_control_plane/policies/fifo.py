"""First come, first served; priorities and shares do not count."""

from __future__ import annotations

from sagellm_control_plane.policies.base import Policy, all_candidates
from sagellm_control_plane.view import RequestView

__all__ = ["POLICY"]


def key(request: RequestView) -> tuple[float, ...]:
    """Order by arrival."""
    return (request.arrived_at,)


POLICY = Policy("fifo", key, banded=False, narrow=all_candidates)
