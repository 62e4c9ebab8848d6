"""Bands of urgency; within a band tenants share fairly, and a tenant's requests go in the order of arrival."""

from __future__ import annotations

from sagellm_control_plane.policies.base import Policy, all_candidates
from sagellm_control_plane.view import RequestView

__all__ = ["POLICY"]


def key(request: RequestView) -> tuple[float, ...]:
    """Order by arrival (the bands stand above it)."""
    return (request.arrived_at,)


POLICY = Policy("priority", key, banded=True, narrow=all_candidates)
