"""Scheduling policies: which waiting request goes next, and which engines it may go to. One small file each, pure."""

from __future__ import annotations

from sagellm_control_plane.policies import adaptive, aegaeon, cost_optimized, fifo, hybrid, priority, slo_aware
from sagellm_control_plane.policies.base import Policy
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["POLICIES", "Policy", "policy_named"]

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        fifo.POLICY,
        priority.POLICY,
        slo_aware.POLICY,
        cost_optimized.POLICY,
        adaptive.POLICY,
        aegaeon.POLICY,
        hybrid.POLICY,
    )
}


def policy_named(name: str) -> Policy:
    """Return the policy called `name`.

    Raises:
        InvalidArgumentError: there is none; the message lists them.
    """
    policy = POLICIES.get(name)
    if policy is None:
        raise InvalidArgumentError(
            f"scheduling policy {name!r} is unknown: use one of {', '.join(sorted(POLICIES))}",
            param="scheduling_policy",
        )
    return policy
