"""The facade's public types, with the field names that its users know."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

import msgspec

__all__ = [
    "AutoscalerConfig",
    "EngineInfo",
    "EngineState",
    "ExecutionInstance",
    "PDSeparationConfig",
    "PerformanceMetrics",
    "RequestMetadata",
    "RequestPriority",
    "RequestStatus",
    "RequestType",
    "SchedulingDecision",
    "SchedulingMetrics",
]


class EngineState(str, Enum):
    """Life of an engine as the control plane sees it; only READY engines get new requests."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    ERROR = "ERROR"


class RequestPriority(IntEnum):
    """Bands of urgency; the lower number goes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    BACKGROUND = 4


class RequestStatus(str, Enum):
    """Where a request stands."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestType(str, Enum):
    """What kind of engine a request needs."""

    LLM_CHAT = "llm_chat"
    LLM_GENERATE = "llm_generate"
    EMBEDDING = "embedding"


class EngineInfo(msgspec.Struct, kw_only=True):
    """One registered engine, as a snapshot."""

    engine_id: str
    model_id: str
    host: str = ""
    port: int = 0
    state: EngineState = EngineState.STARTING
    engine_kind: str = "llm"
    metadata: dict[str, Any] = {}
    created_at: float = 0.0
    last_heartbeat: float | None = None
    consecutive_failures: int = 0
    active_requests: int = 0
    total_requests: int = 0
    failed_requests: int = 0
    managed: bool = False
    pid: int = 0
    restarts: int = 0
    last_error: str = ""
    queued_requests: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    rss_bytes: int = 0

    @property
    def is_healthy(self) -> bool:
        """Whether it is given new requests."""
        return self.state is EngineState.READY


class RequestMetadata(msgspec.Struct, kw_only=True):
    """What `submit_request` knows about a request besides its content."""

    request_id: str
    user_id: str = ""
    priority: RequestPriority = RequestPriority.NORMAL
    slo_deadline_ms: float | None = None
    max_tokens: int | None = None
    model_name: str = ""
    request_type: RequestType = RequestType.LLM_CHAT
    arrival_time: float = 0.0
    status: RequestStatus = RequestStatus.QUEUED
    engine_id: str = ""


class SchedulingDecision(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine a request went to, and why."""

    request_id: str
    target_instance_id: str
    routing_strategy: str
    scheduled_at: float
    estimated_latency_ms: float = 0.0
    estimated_cost: float = 0.0
    prefix_hit_tokens: int = 0
    reason: str = ""
    attempt: int = 1


class ExecutionInstance(msgspec.Struct, frozen=True, kw_only=True):
    """An engine with its load."""

    instance_id: str
    model_name: str
    host: str = ""
    port: int = 0
    active_requests: int = 0
    max_concurrent_requests: int = 0
    current_load: float = 0.0
    avg_latency_ms: float = 0.0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    is_healthy: bool = True


class PDSeparationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill on one engine, decode on another.

    Attributes:
        prefill_engines: share of the engines that take prefill where none has a role (at least one, never all).
        transfer_bytes_per_s: between two engines.
        kv_bytes_per_token: what one token of KV weighs.
        min_prompt_tokens: shorter prompts stay unsplit.
    """

    prefill_engines: float = 0.5
    transfer_bytes_per_s: float = 5e9
    kv_bytes_per_token: int = 131072
    min_prompt_tokens: int = 512


class AutoscalerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and habits of the autoscaler.

    Attributes:
        min_engines: for each model; 0 scales to zero.
        max_engines: for each model.
        target_load: concurrent requests for each engine, as a share of its slots.
        interval_s: between decisions.
        up_stable_s: the need must last this long before an engine is added (a queue adds at once).
        down_stable_s: the surplus must last this long before an engine is removed.
        cold_start_s: what a start is believed to take before one has been seen.
        idle_s: without any request for this long, the last engine may go (only if `min_engines` is 0).
        memory_limit_bytes: all engines together; 0 is no limit.
    """

    min_engines: int = 1
    max_engines: int = 4
    target_load: float = 0.7
    interval_s: float = 5.0
    up_stable_s: float = 5.0
    down_stable_s: float = 60.0
    cold_start_s: float = 5.0
    idle_s: float = 300.0
    memory_limit_bytes: int = 0


class PerformanceMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Measured since the start; times in milliseconds."""

    total_requests: int = 0
    completed_requests: int = 0
    failed_requests: int = 0
    cancelled_requests: int = 0
    rejected_requests: int = 0
    active_requests: int = 0
    waiting_requests: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    avg_ttft_ms: float = 0.0
    p50_ttft_ms: float = 0.0
    p99_ttft_ms: float = 0.0
    avg_tpot_ms: float = 0.0
    throughput_tps: float = 0.0
    uptime_s: float = 0.0


class SchedulingMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler did since the start.

    `reasons` has, for ``sheds``, ``retries`` and ``migrations``, how often each of their reasons occurred; `added_ms_p50` and
    `added_ms_p99` are what the control plane itself added to the time to the first token, waiting for an engine apart.
    """

    scheduling_policy: str
    routing_strategy: str
    decisions: int = 0
    retries: int = 0
    migrations: int = 0
    hedges: int = 0
    splits: int = 0
    kv_transfers: int = 0
    kv_transfer_bytes: int = 0
    sheds: int = 0
    poisoned: int = 0
    prefix_hit_rate: float = 0.0
    mean_decision_us: float = 0.0
    ttft_prediction_error: float = 0.0
    added_ms_p50: float = 0.0
    added_ms_p99: float = 0.0
    reasons: dict[str, dict[str, int]] = {}
