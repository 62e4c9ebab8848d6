"""The words of KV cache management: what is asked for, what is held, and why it goes."""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec

from sagellm_protocol.checks import at_least, not_empty

__all__ = [
    "KVAllocateParams",
    "KVDType",
    "KVEvictParams",
    "KVEvictReason",
    "KVFreeParams",
    "KVHandle",
    "KVHookEvent",
    "KVLayout",
    "KVMigrateParams",
    "KVPrefetchParams",
]


class KVDType(str, Enum):
    """Precision of the cache."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"


class KVLayout(str, Enum):
    """Order of the axes: batch, sequence, head, dimension."""

    BSHD = "bshd"
    BHSD = "bhsd"


class KVEvictReason(str, Enum):
    """Why blocks were given up."""

    MEMORY_PRESSURE = "memory_pressure"
    TTL_EXPIRED = "ttl_expired"
    EXPLICIT_FREE = "explicit_free"


class KVHookEvent(str, Enum):
    """Where a hook on the cache can run."""

    ALLOCATE_BEFORE = "allocate_before"
    ALLOCATE_AFTER = "allocate_after"
    FREE_BEFORE = "free_before"
    FREE_AFTER = "free_after"
    EVICT_BEFORE = "evict_before"
    EVICT_AFTER = "evict_after"
    MIGRATE_BEFORE = "migrate_before"
    MIGRATE_AFTER = "migrate_after"
    PREFETCH_BEFORE = "prefetch_before"
    PREFETCH_AFTER = "prefetch_after"


class KVHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that a request holds. `device` is like ``cpu`` or ``cuda:0``."""

    handle_id: str
    request_id: str
    num_tokens: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        not_empty("handle_id", self.handle_id)
        at_least("num_tokens", self.num_tokens, 1)


class KVAllocateParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask for room for `num_tokens` tokens, in blocks of `block_size` tokens."""

    request_id: str
    num_tokens: int
    kv_dtype: KVDType = KVDType.BF16
    layout: KVLayout = KVLayout.BSHD
    block_size: int = 16
    trace_id: str | None = None
    priority: int = 0
    metadata: dict[str, Any] = {}

    def __post_init__(self) -> None:
        not_empty("request_id", self.request_id)
        at_least("num_tokens", self.num_tokens, 1)
        at_least("block_size", self.block_size, 1)


class KVMigrateParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Move blocks to another device."""

    kv_handle: KVHandle
    target_device: str
    trace_id: str | None = None
    priority: int = 0
    metadata: dict[str, Any] = {}

    def __post_init__(self) -> None:
        not_empty("target_device", self.target_device)


class KVFreeParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Give blocks back; `force` also when they are pinned."""

    kv_handle: KVHandle
    force: bool = False
    trace_id: str | None = None
    metadata: dict[str, Any] = {}


class KVEvictParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Push blocks out, to `target_device` or, where that is None, away."""

    kv_handle: KVHandle
    reason: KVEvictReason
    target_device: str | None = None
    trace_id: str | None = None
    priority: int = 0
    metadata: dict[str, Any] = {}


class KVPrefetchParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bring blocks to `target_device` before they are needed; the first `prefetch_window_tokens`, or all."""

    request_id: str
    kv_handle: KVHandle
    target_device: str
    priority: int = 0
    trace_id: str | None = None
    prefetch_window_tokens: int | None = None
    metadata: dict[str, Any] = {}

    def __post_init__(self) -> None:
        not_empty("target_device", self.target_device)
        if self.prefetch_window_tokens is not None:
            at_least("prefetch_window_tokens", self.prefetch_window_tokens, 1)
