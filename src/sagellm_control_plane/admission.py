"""Who is let in: queue bounds, predicted misses, and what is shed when something more urgent comes."""

from __future__ import annotations

from sagellm_control_plane.config import AdmissionConfig
from sagellm_control_plane.events import exhausted
from sagellm_control_plane.view import Decision, RequestView
from sagellm_protocol.errors import Error

__all__ = ["misses", "refusal"]

#: Bands up to this one may use the whole budget; less urgent ones leave the reserve.
URGENT = 1


def predicted_ttft(decision: Decision, request: RequestView, now: float) -> float:
    """Seconds from now to the first token on the chosen engine."""
    tokens = request.prompt_tokens + request.emitted - decision.hit_tokens
    return decision.engine.predicted_ttft(tokens, now)


def misses(config: AdmissionConfig, request: RequestView, decision: Decision, now: float) -> float | None:
    """Return the seconds by which the request is predicted to miss its objective; None when it is predicted to meet it.

    Streams that have begun are never refused, and without `config.slo` only the request's own deadline counts.
    """
    if request.emitted:
        return None
    budget = request.deadline_at - now
    slo = config.slo
    if slo is not None:
        share = config.slack if request.priority <= URGENT else config.slack * (1.0 - config.reserve)
        budget = min(budget, slo.ttft_s * share - (now - request.arrived_at))
    if budget == float("inf"):
        return None
    late = predicted_ttft(decision, request, now) - budget
    if late > 0.0:
        return late
    if slo is not None:
        pace = decision.engine.predicted_tpot(1, request.prompt_tokens)
        limit = slo.tpot_s if request.priority <= URGENT else slo.tpot_s * (1.0 - config.reserve)
        if pace > limit:
            return pace - limit
    return None


def refusal(request: RequestView, late_s: float) -> Error:
    """Return the 429 of a request that is predicted to miss its objective by `late_s`."""
    wait = max(late_s, 0.1)
    return exhausted(
        f"the cluster is saturated: the first token is predicted {late_s:.2f} s too late; retry in {wait:.1f} s, "
        f"or raise the deadline" + (f" of {request.deadline_s:.2f} s" if request.deadline_s else ""),
        retry_after_s=wait,
    )


def overflow(waiting: int) -> Error:
    """Return the 429 of a full queue."""
    return exhausted(
        f"{waiting} requests are waiting, which is the bound: retry later, or raise max_waiting", retry_after_s=1.0
    )
