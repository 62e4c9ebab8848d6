"""Who is let in: queue bounds, predicted misses, what is kept free for urgent requests, and what is shed."""

from __future__ import annotations

from math import ceil, exp

from sagellm_control_plane.config import AdmissionConfig
from sagellm_control_plane.events import exhausted
from sagellm_control_plane.view import Decision, EngineView, RequestView
from sagellm_protocol.errors import Error

__all__ = ["Admission", "overflow", "refusal"]

#: Bands up to this one are urgent: engines are kept free for them.
URGENT = 1


class Admission:
    """Judges requests by their predicted time to the first token.

    A request that will miss its objective anyway only makes others miss theirs, once there are others: the pressure, a running mean
    of what requests wait before their own prefill, tells whether there are.
    """

    MEMORY_S = 10.0
    URGENT_MEMORY_S = 60.0

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._pressure: dict[str, float] = {}
        self._judged_at: dict[str, float] = {}
        self._urgent_at: dict[str, float] = {}

    def pressure(self, model: str) -> float:
        """Mean predicted wait of the model's recent requests before their own prefill, seconds."""
        return self._pressure.get(model, 0.0)

    def narrow(self, candidates: list[EngineView], request: RequestView, now: float) -> list[EngineView]:
        """Keep the least loaded engines out of reach of requests that are not urgent, while urgent ones come."""
        config = self._config
        if config.slo is None or request.emitted:
            return candidates
        if request.priority <= URGENT:
            self._urgent_at[request.model] = now
            return candidates
        if now - self._urgent_at.get(request.model, float("-inf")) > self.URGENT_MEMORY_S or len(candidates) < 2:
            return candidates
        kept = self.reserved(len(candidates))
        return sorted(candidates, key=lambda e: e.backlog(now))[kept:]

    def judge(self, request: RequestView, decision: Decision, now: float) -> float | None:
        """Return the seconds by which the request is predicted to miss its objective, None if it is to be let in.

        Streams that have begun are never refused, and without `slo` only the request's own deadline counts.
        """
        if request.emitted:
            return None
        slo, engine = self._config.slo, decision.engine
        if slo is None and request.deadline_s is None:
            return None
        own = request.prompt_tokens - decision.hit_tokens
        ttft = engine.predicted_ttft(own, now)
        if ttft > request.deadline_at - now:
            return ttft - (request.deadline_at - now)
        if slo is None:
            return None
        wait = ttft - engine.latency.ttft(own, engine.decoding)
        pressure = self._note(request.model, wait, now)
        late = ttft + (now - request.arrived_at) - slo.ttft_s * self._config.slack
        if late > 0.0 and (pressure > self._config.pressure * slo.ttft_s or wait > 0.5 * slo.ttft_s):
            return late
        pace = engine.predicted_tpot(1, request.prompt_tokens) - slo.tpot_s
        return pace if pace > 0.0 else None

    def _note(self, model: str, wait: float, now: float) -> float:
        """Take a predicted wait into the model's running mean, which forgets with time."""
        gap = now - self._judged_at.get(model, now)
        self._judged_at[model] = now
        weight = max(1.0 - exp(-gap / self.MEMORY_S), 0.02)
        mean = self._pressure.get(model, 0.0)
        mean += weight * (wait - mean)
        self._pressure[model] = mean
        return mean

    def reserved(self, engines: int) -> int:
        """Engines that are kept free for urgent requests, out of so many."""
        return min(ceil(self._config.reserve * engines), engines - 1)


def refusal(request: RequestView, late_s: float) -> Error:
    """Return the 429 of a request that is predicted to miss its objective by `late_s`."""
    wait = max(late_s, 0.1)
    return exhausted(
        f"the cluster is saturated: the first token is predicted {late_s:.2f} s too late; retry in {wait:.1f} s"
        + (f", or raise the deadline of {request.deadline_s:.2f} s" if request.deadline_s else ""),
        retry_after_s=wait,
    )


def overflow(waiting: int) -> Error:
    """Return the 429 of a full queue."""
    return exhausted(
        f"{waiting} requests are waiting, which is the bound: retry later, or raise max_waiting", retry_after_s=1.0
    )
