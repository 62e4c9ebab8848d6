"""What one request cost, measured."""

from __future__ import annotations

import msgspec

from sagellm_protocol.checks import at_least, in_range
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Metrics", "Timestamps"]


class Timestamps(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a request passed each stage, in unix seconds; None where it has not.

    Attributes:
        queued_at: it entered the queue.
        scheduled_at: an engine gave it its first place in a step.
        executed_at: its first token was there.
        completed_at: its last token was there.
    """

    queued_at: float | None = None
    scheduled_at: float | None = None
    executed_at: float | None = None
    completed_at: float | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None:
                at_least(name, value, 0.0)


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics of one request or of one run. Where a feature is off its counters are 0.

    `tbt_ms` and `tpot_ms` are two names of the mean time between output tokens: one of them is required, and each stands in
    for the other if only one is given.

    Attributes:
        ttft_ms: milliseconds to the first token.
        throughput_tps: output tokens a second.
        peak_mem_mb: peak resident memory in MiB.
        error_rate: share of failed requests, [0, 1].
        tbt_ms: milliseconds between tokens.
        tpot_ms: milliseconds an output token.
        kv_used_tokens: tokens in KV blocks.
        kv_used_bytes: bytes of those blocks.
        prefix_hit_rate: share of prompt tokens that were found in the prefix cache, [0, 1].
        evict_count: blocks evicted.
        evict_ms: milliseconds spent on it.
        spec_accept_rate: share of drafted tokens that were accepted, [0, 1].
        prefill_ms: milliseconds of prefill.
        decode_ms: milliseconds of decode.
        kv_transfer_count: KV hand-overs between engines.
        kv_transfer_bytes: their bytes.
        kv_transfer_ms: their milliseconds.
        itl_list: milliseconds between consecutive tokens.
        timestamps: when the request passed each stage.
    """

    ttft_ms: float
    throughput_tps: float
    peak_mem_mb: float
    error_rate: float
    tbt_ms: float | None = None
    tpot_ms: float | None = None
    kv_used_tokens: int = 0
    kv_used_bytes: int = 0
    prefix_hit_rate: float = 0.0
    evict_count: int = 0
    evict_ms: float = 0.0
    spec_accept_rate: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    kv_transfer_count: int = 0
    kv_transfer_bytes: int = 0
    kv_transfer_ms: float = 0.0
    itl_list: tuple[float, ...] = ()
    timestamps: Timestamps | None = None

    def __post_init__(self) -> None:
        if self.tbt_ms is None and self.tpot_ms is None:
            raise InvalidArgumentError("tbt_ms and tpot_ms are both missing: give one of them", param="tbt_ms")
        if self.tbt_ms is None:
            msgspec.structs.force_setattr(self, "tbt_ms", self.tpot_ms)
        elif self.tpot_ms is None:
            msgspec.structs.force_setattr(self, "tpot_ms", self.tbt_ms)
        for name in ("error_rate", "prefix_hit_rate", "spec_accept_rate"):
            in_range(name, getattr(self, name), 0.0, 1.0)
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, (int, float)):
                at_least(name, value, 0.0)
        for i, gap in enumerate(self.itl_list):
            at_least(f"itl_list[{i}]", gap, 0.0)
