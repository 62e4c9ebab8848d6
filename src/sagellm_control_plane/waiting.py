"""Requests that no engine has room for: they wait centrally, one queue for each model, in the order of the policy."""

from __future__ import annotations

from sagellm_control_plane import admission
from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import Command, Fail, unavailable
from sagellm_control_plane.fairness import TokenCounters, WaitingQueue
from sagellm_control_plane.placement import Placement
from sagellm_control_plane.records import Record, Records
from sagellm_control_plane.stats import Stats
from sagellm_control_plane.view import ClusterView, RequestView
from sagellm_protocol.errors import Error, ErrorCode

__all__ = ["WaitingRoom"]


class WaitingRoom:
    """Holds requests, sends them while there is room, and fails those that have waited enough."""

    def __init__(
        self,
        config: CoreConfig,
        view: ClusterView,
        records: Records,
        placement: Placement,
        judge: admission.Admission,
        counters: TokenCounters,
        stats: Stats,
    ) -> None:
        self._config = config
        self._view = view
        self._records = records
        self._placement = placement
        self._admission = judge
        self._counters = counters
        self._stats = stats
        self._queues: dict[str, WaitingQueue] = {}

    def count(self, model: str | None = None) -> int:
        """Sequences held, for one model or all."""
        if model is not None:
            queue = self._queues.get(model)
            return len(queue) if queue is not None else 0
        return sum(len(queue) for queue in self._queues.values())

    def hold(self, record: Record, now: float) -> list[Command]:
        """Let the request wait, ahead of newcomers if its stream has begun."""
        request = record.request
        self._records.keep(record)
        record.queued_at = now
        queue = self._queues.get(request.model)
        if queue is None:
            fair = self._config.fairness.enabled
            queue = self._queues[request.model] = WaitingQueue(self._placement.policy, self._counters, fair=fair)
        queue.push(request)
        self._view.waiting_since.setdefault(request.model, request.arrived_at)
        return []

    def hold_if_room(self, record: Record, now: float) -> list[Command]:
        """Queue the newcomer; when the queue is full, refuse it, or somebody less urgent in its favour."""
        request, queue = record.request, self._queues[record.request.model]
        if len(queue) < self._config.admission.max_waiting:
            return self.hold(record, now)
        error = admission.overflow(len(queue))
        worst = queue.worst()
        if worst is None or worst.priority <= request.priority:
            return self.refuse(request, error, "queue_full")
        queue.remove(worst.request_id)
        self._records.drop(worst.request_id)
        return self.refuse(worst, error, "displaced") + self.hold(record, now)

    def refuse(self, request: RequestView, error: Error, reason: str) -> list[Command]:
        """Refuse a request for overload."""
        self._stats.because("sheds", reason)
        self._stats.shed += 1
        self._stats.rejected += 1
        return [Fail(request.request_id, error)]

    def leave(self, record: Record) -> None:
        """The request does not wait any more: somebody gave it up."""
        if record.queued_at is not None:
            self._queues[record.request.model].remove(record.request.request_id)

    def reorder(self) -> None:
        """The policy has changed: order what waits by the new one."""
        self._queues = {model: q.ordered_copy(self._placement.policy) for model, q in self._queues.items()}

    def tick(self, now: float) -> list[Command]:
        """Time passed: fail what has waited enough, send what can be sent."""
        commands: list[Command] = []
        for model, queue in self._queues.items():
            if queue:
                commands += self._expire(queue, now)
                commands += self.pump(model, now)
        return commands

    def pump(self, model: str, now: float) -> list[Command]:
        """Send waiting requests while there is room; where models take turns on a device, the others' as well."""
        commands = self._pump_one(model, now)
        if self._view.turns:
            for other, queue in self._queues.items():
                if queue and other != model:
                    commands += self._pump_one(other, now)
        return commands

    def _pump_one(self, model: str, now: float) -> list[Command]:
        queue = self._queues.get(model)
        if not queue:
            self._view.waiting_since.pop(model, None)
            return []
        commands: list[Command] = []
        while (request := queue.peek()) is not None:
            decision = self._placement.decide(request, now) if self._view.ready.get(model) else None
            if decision is None:
                break
            queue.remove(request.request_id)
            record = self._records[request.request_id]
            late = self._admission.judge(request, decision, now)
            if late is not None:
                self._records.drop(request.request_id)
                commands += self.refuse(request, admission.refusal(request, late), "late")
                continue
            commands.append(self._placement.dispatch(record, decision, now))
        head = queue.peek()
        if head is None:
            self._view.waiting_since.pop(model, None)
        else:
            self._view.waiting_since[model] = head.arrived_at
        return commands

    def strand(self, model: str, now: float) -> list[Command]:
        """An engine went away: fail what waits for a model that nobody serves any more."""
        queue = self._queues.get(model)
        if not queue or self._view.ready.get(model):
            return []
        return self._expire(queue, now)

    def _expire(self, queue: WaitingQueue, now: float) -> list[Command]:
        commands: list[Command] = []
        for request in list(queue):
            error = self._overdue(request, now)
            if error is not None:
                queue.remove(request.request_id)
                self._records.end(self._records[request.request_id], request.emitted)
                self._stats.failed += 1
                commands.append(Fail(request.request_id, error))
        return commands

    def _overdue(self, request: RequestView, now: float) -> Error | None:
        """Return why a waiting request has waited enough, or None."""
        if request.deadline_at <= now and not request.emitted:
            return Error(
                code=ErrorCode.DEADLINE_EXCEEDED,
                message=f"the deadline of {request.deadline_s:.2f} s passed while the request waited for an engine",
            )
        if self._view.ready.get(request.model):
            return None
        record = self._records[request.request_id]
        waited = now - (record.queued_at if record.queued_at is not None else now)
        retry = self._config.retry
        if request.emitted:
            patience = retry.recovery_wait_s
        elif record.tries:
            patience = retry.retry_wait_s
        else:
            patience = max(self._config.admission.cold_wait_s, retry.retry_wait_s)
        if waited < patience:
            return None
        return record.last_error or unavailable(
            f"no engine of model {request.model!r} became ready within {waited:.1f} s: try again", retry_after_s=1.0
        )
