"""What the control plane's page of the contract lists: names, fields, and faults of the old manager that must be impossible."""

from __future__ import annotations

import gc
import inspect
import random
import tracemalloc

import pytest

from sagellm_control_plane import types
from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import (
    AttemptFinished,
    Dispatch,
    EngineJoined,
    EngineStateChanged,
    FirstToken,
    RequestArrived,
    RequestCancelled,
)
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.policies import policy_named
from sagellm_control_plane.routing import ROUTES
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import EngineProfile, RequestView

COROUTINES = [
    "start", "stop", "execute_request", "submit_request", "get_request_result", "get_embeddings",
    "stop_engine_gracefully", "request_engine_startup", "request_engine_shutdown",
]  # fmt: skip
PLAIN = [
    "register_engine", "unregister_engine", "get_engine_info", "list_engines", "list_registered_engines",
    "get_engines_for_model", "update_engine_state", "record_engine_heartbeat", "record_engine_failure",
    "start_engine_drain", "prune_stopped_engines", "stream_request", "get_request_status", "cancel_request",
    "get_status", "get_cluster_status", "get_metrics", "get_scheduling_metrics", "get_registered_backends",
    "get_engine_health_status", "get_autoscaler_status", "update_policy", "update_routing",
]  # fmt: skip
FIELDS = {
    "EngineInfo": "engine_id model_id host port state engine_kind metadata created_at last_heartbeat",
    "RequestMetadata": "request_id user_id priority slo_deadline_ms max_tokens model_name request_type arrival_time",
    "SchedulingDecision": "request_id target_instance_id routing_strategy scheduled_at estimated_latency_ms",
    "ExecutionInstance": "instance_id model_name host port active_requests max_concurrent_requests current_load",
    "PDSeparationConfig": "prefill_engines",
    "AutoscalerConfig": "min_engines max_engines",
    "PerformanceMetrics": "total_requests completed_requests failed_requests avg_ttft_ms",
    "SchedulingMetrics": "scheduling_policy routing_strategy decisions retries migrations",
}


@pytest.mark.parametrize("name", [*COROUTINES, *PLAIN])
def test_every_method_of_the_contract_is_there(name):
    """The facade has the method, documented, awaited or not as the contract says."""
    method = getattr(ControlPlaneManager, name)
    assert inspect.iscoroutinefunction(method) is (name in COROUTINES)
    assert method.__doc__


def test_the_constructor_takes_what_the_contract_names():
    """The old keyword arguments are there, and the defaults are those of the page."""
    parameters = inspect.signature(ControlPlaneManager).parameters
    names = (
        "scheduling_policy routing_strategy mode enable_auto_scaling enable_pd_separation auto_restart"
        " max_restart_attempts health_check_interval"
    )
    assert set(names.split()) <= set(parameters)
    manager = ControlPlaneManager()
    status = manager.get_status()
    assert (status["scheduling_policy"], status["routing_strategy"], status["mode"]) == (
        "adaptive",
        "load_balanced",
        "http",
    )


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_types_keep_their_fields(name):
    """Public types have the field names that users of earlier versions know."""
    assert set(FIELDS[name].split()) <= set(getattr(types, name).__struct_fields__)


def test_states_priorities_and_policies_have_their_names():
    """Engine states, bands, scheduling policies and routing strategies are those of the page."""
    assert [s.value for s in types.EngineState] == ["STARTING", "READY", "DRAINING", "STOPPED", "ERROR"]
    assert (types.RequestPriority.CRITICAL, types.RequestPriority.BACKGROUND) == (0, 4)
    for name in ("fifo", "priority", "slo_aware", "cost_optimized", "adaptive", "aegaeon", "hybrid"):
        assert policy_named(name).name == name
    wanted = """load_balanced round_robin random least_loaded power_of_two affinity locality topology_aware kv_aware
        predicted_latency"""
    assert set(wanted.split()) <= set(ROUTES)


def run_requests(state: ControlState, count: int, rng: random.Random, now: float) -> float:
    """Run requests of ever new names, sessions and prompts, half of them cancelled, none left at the end."""
    for _ in range(count):
        now += 0.01
        name = f"{rng.getrandbits(64):x}"
        blocks = tuple(rng.randbytes(16) for _ in range(4))
        view = RequestView(
            request_id=name, model="m", prompt_tokens=64, blocks=blocks, block_tokens=16, tenant="t", session=name,
            arrived_at=now,
        )  # fmt: skip
        (command,) = state.on_event(RequestArrived(view), now)
        assert isinstance(command, Dispatch)
        assert command.request_id == name
        state.on_event(FirstToken(name, 1), now + 0.001)
        if rng.random() < 0.5:
            state.on_event(RequestCancelled(name, 1), now + 0.002)
        else:
            state.on_event(AttemptFinished(name, 1, 8), now + 0.003)
    return now


def held_bytes():
    """What the control plane's own code has allocated and not freed since tracing began; other threads of the process do not count."""
    gc.collect()
    ours = tracemalloc.Filter(inclusive=True, filename_pattern="*/sagellm_control_plane/*")
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces)


@pytest.mark.parametrize("routing", ["load_balanced", "affinity", "round_robin"])
def test_the_core_does_not_grow_with_what_has_passed(routing):
    """After thousands of requests the core's memory is what it was after the first ones: nothing is kept of what has ended."""
    rng = random.Random(4)
    state = ControlState(CoreConfig(routing_strategy=routing), random.Random(1))
    for engine in ("a", "b"):
        state.on_event(EngineJoined(EngineProfile(engine_id=engine, model="m", slots=8, n_blocks=256)), 0.0)
        state.on_event(EngineStateChanged(engine, "READY", fresh=True), 0.0)
    now = run_requests(state, 1000, rng, 0.0)
    tracemalloc.start()
    try:
        now = run_requests(state, 1000, rng, now)
        middle = held_bytes()
        run_requests(state, 3000, rng, now)
        after = held_bytes()
    finally:
        tracemalloc.stop()
    # The first thousand under the tracer replaces what was there before it; from then on nothing may be added.
    assert after - middle < 5_000
    assert (state.active, state.ledger.open, state.waiting()) == (0, 0, 0)
