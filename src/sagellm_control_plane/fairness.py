"""Fair shares among tenants, and the queue of one model that applies them.

Virtual token counter (Sheng et al., *Fairness in Serving Large Language Models*, OSDI 2024): every tenant's counter grows by the
tokens that it was served; the waiting tenant with the smallest counter goes next; a tenant that was away is lifted to the
smallest counter of those that wait, so that idling earns no credit.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from sagellm_control_plane.config import FairnessConfig
from sagellm_control_plane.policies.base import Policy
from sagellm_control_plane.view import RequestView

__all__ = ["TokenCounters", "WaitingQueue"]

_Entry = tuple[tuple[float, ...], int, RequestView]


class TokenCounters:
    """Virtual tokens served to each tenant. Tenants without anything waiting are forgotten beyond a bound."""

    MAX_TENANTS = 100_000

    def __init__(self, config: FairnessConfig) -> None:
        self._config = config
        self._served: dict[str, float] = {}

    def of(self, tenant: str) -> float:
        """Virtual tokens of a tenant."""
        return self._served.get(tenant, 0.0)

    def charge(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count tokens that a tenant was served."""
        config = self._config
        cost = config.prompt_weight * prompt_tokens + config.output_weight * output_tokens
        served = self._served
        served[tenant] = served.get(tenant, 0.0) + cost
        if len(served) > self.MAX_TENANTS:
            # Dropping the least served half costs them nothing: they are lifted to the minimum when they return.
            keep = heapq.nlargest(self.MAX_TENANTS // 2, served.items(), key=lambda item: item[1])
            self._served = dict(keep)

    def lift(self, tenant: str, floor: float) -> None:
        """A tenant returns: it starts no lower than those that wait."""
        if self._served.get(tenant, 0.0) < floor:
            self._served[tenant] = floor


class WaitingQueue:
    """Waiting requests of one model: resumed streams first, then by band, then by fair share, then by the policy's key."""

    RESUMED = -1

    def __init__(self, policy: Policy, counters: TokenCounters, *, fair: bool) -> None:
        self._policy = policy
        self._counters = counters
        self._fair = fair
        self._bands: dict[int, dict[str, list[_Entry]]] = {}
        self._members: dict[str, RequestView] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[RequestView]:
        return iter(self._members.values())

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._members

    def _band(self, request: RequestView) -> int:
        if request.emitted or request.avoid:
            return self.RESUMED
        return request.priority if self._policy.banded else 0

    def push(self, request: RequestView) -> None:
        """Add a request."""
        band = self._bands.setdefault(self._band(request), {})
        tenant = request.tenant if self._policy.banded and self._fair else ""
        if tenant not in band:
            if band:
                self._counters.lift(tenant, min(self._counters.of(other) for other in band))
            band[tenant] = []
        self._serial += 1
        heapq.heappush(band[tenant], (self._policy.key(request), self._serial, request))
        self._members[request.request_id] = request

    def peek(self) -> RequestView | None:
        """Return the request that goes next."""
        for number in sorted(self._bands):
            band = self._bands[number]
            for tenant in list(band):
                self._trim(band, tenant)
            if band:
                tenant = min(band, key=self._counters.of) if len(band) > 1 else next(iter(band))
                return band[tenant][0][2]
            del self._bands[number]
        return None

    def _trim(self, band: dict[str, list[_Entry]], tenant: str) -> None:
        """Drop removed requests from the head of a tenant's heap, and the tenant when nothing is left."""
        heap = band[tenant]
        while heap and heap[0][2] is not self._members.get(heap[0][2].request_id):
            heapq.heappop(heap)
        if not heap:
            del band[tenant]

    def remove(self, request_id: str) -> RequestView | None:
        """Take a request out, wherever it stands."""
        return self._members.pop(request_id, None)

    def worst(self) -> RequestView | None:
        """Return the request that would be shed first: the least urgent band's latest; never a resumed stream."""
        candidates = [r for r in self._members.values() if self._band(r) != self.RESUMED]
        return max(candidates, key=lambda r: (r.priority, self._policy.key(r)), default=None)

    def ordered_copy(self, policy: Policy) -> WaitingQueue:
        """Return the same requests ordered by another policy."""
        other = WaitingQueue(policy, self._counters, fair=self._fair)
        for request in self._members.values():
            other.push(request)
        return other
