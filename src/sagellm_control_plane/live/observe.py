"""The control plane's state as plain data, for status pages and metrics."""

from __future__ import annotations

from typing import Any

import msgspec

from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.engines import Engines
from sagellm_control_plane.live.registry import Engine
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.types import (
    EngineInfo,
    EngineState,
    ExecutionInstance,
    PerformanceMetrics,
    SchedulingMetrics,
)

__all__ = ["ModelInfo", "adapters", "cluster_status", "engine_info", "health", "models", "performance", "scheduling"]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A served model.

    Attributes:
        id: the name it is served under.
        kind: ``llm`` or ``embedding``.
        context_length: tokens, prompt and output together.
        engines: how many engines serve it, in any state.
        ready: how many of them are READY.
        created: unix seconds of the first engine's registration.
        parent: the model that it is an adapter of, or empty.
    """

    id: str
    kind: str
    context_length: int
    engines: int
    ready: int
    created: float
    parent: str = ""


def adapters(served: list[ModelInfo], names: dict[str, str]) -> list[ModelInfo]:
    """Return the adapters of served models as models of their own."""
    by_id = {info.id: info for info in served}
    return [
        msgspec.structs.replace(by_id[model], id=name, parent=model)
        for name, model in sorted(names.items())
        if model in by_id
    ]


def models(dispatcher: Dispatcher, engines: Engines) -> list[ModelInfo]:
    """Return the served models, those without an engine left out."""
    found = []
    for model_id in engines.models():
        serving = [e for e in dispatcher.registry.of_model(model_id) if e.info.state is not EngineState.STOPPED]
        if not serving:
            continue
        found.append(
            ModelInfo(
                id=model_id,
                kind=serving[0].info.engine_kind,
                context_length=engines.text_side(model_id).context_length,
                engines=len(serving),
                ready=sum(e.info.state is EngineState.READY for e in serving),
                created=min(e.info.created_at for e in serving),
            )
        )
    return found


def engine_info(dispatcher: Dispatcher, engine: Engine) -> EngineInfo:
    """Return a snapshot of one engine."""
    view = dispatcher.state.view.engines.get(engine.info.engine_id)
    running = view.running if view is not None else 0
    failed = view.failed if view is not None else engine.info.failed_requests
    info = msgspec.structs.replace(engine.info, active_requests=running, failed_requests=failed)
    info.kv_blocks_total = _blocks_total(engine)
    if engine.status is not None:
        info.queued_requests = engine.status.waiting
        info.kv_blocks_used = engine.status.blocks_used
        info.rss_bytes = engine.status.rss_bytes
    return info


def _blocks_total(engine: Engine) -> int:
    """As it last reported; before its first report, as it described itself."""
    if engine.status is not None:
        return engine.status.blocks_total
    return engine.description.n_blocks if engine.description is not None else 0


def cluster_status(dispatcher: Dispatcher) -> dict[str, Any]:
    """Return engines with their load, by model."""
    by_model: dict[str, list[dict[str, Any]]] = {}
    for engine in dispatcher.registry.all():
        row = msgspec.to_builtins(_instance(dispatcher, engine))
        row["state"] = engine.info.state.value
        row["pid"] = engine.info.pid
        by_model.setdefault(engine.info.model_id, []).append(row)
    waiting = {model: dispatcher.state.waiting(model) for model in by_model}
    return {"models": by_model, "waiting": waiting, "open_leases": dispatcher.state.ledger.open}


def _instance(dispatcher: Dispatcher, engine: Engine) -> ExecutionInstance:
    view = dispatcher.state.view.engines.get(engine.info.engine_id)
    status = engine.status
    return ExecutionInstance(
        instance_id=engine.info.engine_id,
        model_name=engine.info.model_id,
        host=engine.info.host,
        port=engine.info.port,
        active_requests=view.running if view is not None else 0,
        max_concurrent_requests=view.limit if view is not None else 0,
        current_load=view.running / view.limit if view is not None and view.limit else 0.0,
        avg_latency_ms=view.predicted_ttft(0, dispatcher.clock()) * 1000.0 if view is not None else 0.0,
        kv_blocks_used=status.blocks_used if status is not None else 0,
        kv_blocks_total=_blocks_total(engine),
        is_healthy=engine.info.is_healthy,
    )


def health(dispatcher: Dispatcher, engine: Engine) -> dict[str, Any]:
    """Return the signs by which an engine is judged."""
    view = dispatcher.state.view.engines.get(engine.info.engine_id)
    return {
        "engine_id": engine.info.engine_id,
        "state": engine.info.state.value,
        "healthy": engine.info.is_healthy,
        "hung": engine.hung,
        "breaker": view.breaker.state(dispatcher.clock()) if view is not None else "closed",
        "consecutive_failures": engine.info.consecutive_failures,
        "missed_probes": engine.missed_probes,
        "last_heartbeat": engine.info.last_heartbeat,
        "last_error": engine.info.last_error,
        "restarts": engine.info.restarts,
    }


def performance(state: ControlState, uptime_s: float) -> PerformanceMetrics:
    """Return what was measured since the start."""
    stats = state.stats
    return PerformanceMetrics(
        total_requests=stats.arrived,
        completed_requests=stats.completed,
        failed_requests=stats.failed,
        cancelled_requests=stats.cancelled,
        rejected_requests=stats.rejected,
        active_requests=state.active,
        waiting_requests=state.waiting(),
        output_tokens=stats.output_tokens,
        prompt_tokens=stats.prompt_tokens,
        avg_ttft_ms=stats.ttft.mean * 1000.0,
        p50_ttft_ms=stats.ttft.quantile(0.5) * 1000.0,
        p99_ttft_ms=stats.ttft.quantile(0.99) * 1000.0,
        avg_tpot_ms=stats.tpot.mean * 1000.0,
        throughput_tps=stats.output_tokens / uptime_s if uptime_s > 0.0 else 0.0,
        uptime_s=uptime_s,
    )


def scheduling(dispatcher: Dispatcher) -> SchedulingMetrics:
    """Return what the scheduler did since the start."""
    state, stats = dispatcher.state, dispatcher.state.stats
    events = dispatcher.decision_events
    return SchedulingMetrics(
        scheduling_policy=state.scheduling_policy,
        routing_strategy=state.routing_strategy,
        decisions=stats.decisions,
        retries=stats.retries,
        migrations=stats.migrations,
        hedges=stats.hedges,
        splits=stats.splits,
        kv_transfers=dispatcher.split_stats.transfers,
        kv_transfer_bytes=dispatcher.split_stats.bytes,
        sheds=stats.shed,
        poisoned=stats.poisoned,
        prefix_hit_rate=stats.hit_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
        mean_decision_us=dispatcher.decision_seconds / events * 1e6 if events else 0.0,
        ttft_prediction_error=stats.ttft_error.mean,
        added_ms_p50=dispatcher.added.quantile(0.5) * 1000.0,
        added_ms_p99=dispatcher.added.quantile(0.99) * 1000.0,
        reasons={what: dict(counts) for what, counts in stats.reasons.items()},
    )
