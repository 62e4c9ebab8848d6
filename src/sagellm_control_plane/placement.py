"""Where a request goes, and what it takes there: candidates, admission, policy and route in turn, then the leases."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane import pairing
from sagellm_control_plane.admission import Admission
from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import Dispatch
from sagellm_control_plane.fairness import TokenCounters
from sagellm_control_plane.ledger import Ledger
from sagellm_control_plane.policies import policy_named
from sagellm_control_plane.policies.base import all_candidates
from sagellm_control_plane.records import Attempt, Record
from sagellm_control_plane.routing import route_named
from sagellm_control_plane.stats import Stats
from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["Placement"]


class Placement:
    """Places requests by the policy and the routing strategy in force."""

    def __init__(
        self,
        config: CoreConfig,
        view: ClusterView,
        ledger: Ledger,
        admission: Admission,
        counters: TokenCounters,
        stats: Stats,
        rng: RandomSource,
    ) -> None:
        self._config = config
        self._view = view
        self._ledger = ledger
        self._admission = admission
        self._counters = counters
        self._stats = stats
        self._rng = rng
        self.policy = policy_named(config.scheduling_policy)
        self.routing_strategy = config.routing_strategy
        self._route = route_named(config.routing_strategy)

    def use(self, scheduling_policy: str, routing_strategy: str) -> bool:
        """Change either from the next request on, both or nothing; an empty name leaves that part. True for another policy.

        Raises:
            InvalidArgumentError: there is none of that name.
        """
        policy = policy_named(scheduling_policy) if scheduling_policy else self.policy
        route = route_named(routing_strategy) if routing_strategy else self._route
        changed = policy is not self.policy
        self.policy, self._route = policy, route
        self.routing_strategy = routing_strategy or self.routing_strategy
        return changed

    def decide(self, request: RequestView, now: float) -> Decision | None:
        """Return where the request goes now; None if it has to wait."""
        candidates = self._view.candidates(request, now, self._rng)
        if not candidates:
            return None
        narrowed: Sequence[EngineView] = candidates
        if self._config.admission.slo is not None:
            narrowed = self._admission.narrow(candidates, request, now)
        if self.policy.narrow is not all_candidates:
            narrowed = self.policy.narrow(self._view, request, narrowed, now)
            if not narrowed:
                return None
        decision = self._choose(request, narrowed, now)
        hold = self._config.admission.hold_above_s
        if hold is not None and decision.engine.running:
            uncached = request.prompt_tokens + request.emitted - decision.hit_tokens
            own = decision.engine.latency.ttft(uncached, decision.engine.decoding)
            if decision.engine.predicted_ttft(uncached, now) - own > hold:
                return None
        return decision

    def _choose(self, request: RequestView, engines: Sequence[EngineView], now: float) -> Decision:
        config = self._config
        if config.pd is None:
            return self._route(self._view, request, engines, now, self._rng)

        def route(some: Sequence[EngineView]) -> Decision:
            return self._route(self._view, request, some, now, self._rng)

        output = self._view.expected_output(request, config.default_output_tokens)
        return pairing.choose(self._view, request, engines, now, config.pd, output, route)

    def second(self, request: RequestView, busy: Sequence[str], now: float) -> Sequence[EngineView]:
        """Return the engines that could take a second attempt: any but the `busy` ones."""
        return [e for e in self._view.candidates(request, now, self._rng) if e.engine_id not in busy]

    def route(self, request: RequestView, engines: Sequence[EngineView], now: float) -> Decision:
        """Return the routing strategy's choice among `engines`."""
        return self._route(self._view, request, engines, now, self._rng)

    def dispatch(self, record: Record, decision: Decision, now: float, *, hedge: bool = False) -> Dispatch:
        """Send the request there: leases, counters, prefix index, and the command."""
        request = record.request
        context = request.prompt_tokens + request.emitted
        engine, pair = decision.engine, decision.prefill is not None
        first = decision.prefill or engine
        uncached = context - decision.hit_tokens
        ahead = first.backlog(now) + uncached
        predicted = first.latency.ttft(ahead, first.decoding)
        suspect = record.suspicion > 0.0
        prefill = self._ledger.take(first, uncached, context, now, suspect=suspect) if pair else None
        lease = self._ledger.take(engine, 1 if pair else uncached, context, now, suspect=suspect)
        if not engine.breaker.closed:
            engine.breaker.on_dispatch(now)
        turn = self._view.turns.get(engine.profile.device)
        if turn is not None:
            turn.sent += 1
        record.queued_at = None
        record.tries += 1
        record.attempts[record.tries] = Attempt(lease, prefill, now, predicted, ahead, hedge=hedge)
        if request.blocks:
            self._view.prefix.record(engine.engine_id, request.blocks)
            if pair:
                self._view.prefix.record(first.engine_id, request.blocks)
        stats = self._stats
        stats.decisions += 1
        stats.prompt_tokens += request.prompt_tokens
        stats.hit_tokens += decision.hit_tokens
        stats.splits += pair
        if record.tries == 1:
            self._counters.charge(request.tenant, request.prompt_tokens, 0)
        after = None
        if self._config.hedge.enabled and not request.emitted and record.tries == 1:
            after = max(first.latency.ttft_p95(ahead, first.decoding), self._config.hedge.min_delay_s)
        return Dispatch(
            request.request_id,
            record.tries,
            engine.engine_id,
            decision.hit_tokens,
            predicted,
            hedge,
            after,
            decision.reason,
            first.engine_id if pair else "",
        )
