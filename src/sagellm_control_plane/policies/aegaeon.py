"""Several models on shared devices, switched in turns (after Aegaeon, SOSP 2025).

Models whose engines share a device (`EngineProfile.device`) take it in turns, so that switching is paid for by a group of requests and
not by each. Requests are grouped by model in the order of arrival, up to a bound; the model whose group is oldest has the device; its
turn ends when the group has been sent, or when it has lasted its quota while another model waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.policies.base import Policy
from sagellm_control_plane.view import ClusterView, DeviceTurn, EngineView, RequestView

__all__ = ["GROUP", "POLICY", "QUOTA_S"]

#: Requests that one turn may take in.
GROUP = 8
#: Seconds after which a turn takes in nothing more while another model waits.
QUOTA_S = 4.0


def key(request: RequestView) -> tuple[float, ...]:
    """Order by arrival."""
    return (request.arrived_at,)


def narrow(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float
) -> Sequence[EngineView]:
    """Keep engines that have a device of their own, or whose model has the turn; streams that have begun are never held back."""
    if request.emitted:
        return candidates
    return [engine for engine in candidates if not engine.profile.device or _may_join(view, engine, request, now)]


def _may_join(view: ClusterView, engine: EngineView, request: RequestView, now: float) -> bool:
    device = engine.profile.device
    turn = view.turns.get(device)
    others_busy = any(e.running for e in view.on_device(device) if e.model != engine.model)
    if turn is None or (turn.model != engine.model and not others_busy):
        if _older_group_waits(view, device, engine.model, request):
            return False
        view.turns[device] = DeviceTurn(engine.model, now)
        return True
    if turn.model != engine.model:
        return False
    if turn.sent >= GROUP or now - turn.began > QUOTA_S:
        if _others_wait(view, device, engine.model):
            return False
        view.turns[device] = DeviceTurn(engine.model, now)
    return True


def _others_wait(view: ClusterView, device: str, model: str) -> bool:
    return any(view.waiting_since.get(e.model) is not None for e in view.on_device(device) if e.model != model)


def _older_group_waits(view: ClusterView, device: str, model: str, request: RequestView) -> bool:
    """Whether another model of the device has waited longer than this request."""
    since = [view.waiting_since.get(e.model) for e in view.on_device(device) if e.model != model]
    return any(at is not None and at < request.arrived_at for at in since)


POLICY = Policy("aegaeon", key, banded=True, narrow=narrow)
