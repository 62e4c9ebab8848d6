"""``sage-llm demo``: three segments on a real engine, every number measured, judged by the year's thresholds.

======== ============ ============== =================================================
segment  tokens       at a time      what it is for
======== ============ ============== =================================================
short    128 → 128    1              latency: TTFT, TBT and TPOT are its medians
long     2048 → 512   1              prefill of a long prompt; fills the cache
stress   512 → 256    4              throughput, while the cache must evict
======== ============ ============== =================================================

The KV cache is sized to hold the largest segment and little more, so that blocks of earlier requests have to go. From year 2 on
the prompts of a segment share a beginning, from year 3 on tokens are guessed ahead. One request before each segment warms the engine
and is not counted; `prefix_hit_rate` is the share of the counted requests' prompt tokens that were found in the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sagellm import compose
from sagellm.bench.report import percentile
from sagellm.bench.runner import Record, run_workload
from sagellm.bench.workload import Arrival, closed_loop, prompt_of
from sagellm.embedded import EmbeddedTransport
from sagellm_protocol.engine import EngineStatus
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["AT_LEAST", "METRICS", "THRESHOLDS", "YEARS", "judge", "run_demo"]

THRESHOLDS: dict[str, dict[str, float]] = {
    "year1": {"ttft_ms": 100, "tbt_ms": 20, "throughput_tps": 50, "error_rate": 0.05, "peak_mem_mb": 32768},
    "year2": {
        "ttft_ms": 50,
        "tbt_ms": 10,
        "throughput_tps": 100,
        "error_rate": 0.02,
        "peak_mem_mb": 24576,
        "prefix_hit_rate": 0.70,
    },
    "year3": {
        "ttft_ms": 30,
        "tbt_ms": 5,
        "throughput_tps": 200,
        "error_rate": 0.01,
        "peak_mem_mb": 16384,
        "prefix_hit_rate": 0.85,
        "spec_accept_rate": 0.60,
    },
}
YEARS = tuple(THRESHOLDS)
AT_LEAST = {"throughput_tps", "prefix_hit_rate", "spec_accept_rate"}
METRICS = (
    "ttft_ms",
    "tbt_ms",
    "tpot_ms",
    "throughput_tps",
    "peak_mem_mb",
    "error_rate",
    "kv_used_tokens",
    "kv_used_bytes",
    "prefix_hit_rate",
    "evict_count",
    "evict_ms",
    "spec_accept_rate",
)
_SHARED = {"year1": 0.0, "year2": 0.85, "year3": 0.95}
_SLACK = 1.1


@dataclass(frozen=True)
class Segment:
    """Requests of one size."""

    name: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    requests: int

    @property
    def resident_tokens(self) -> int:
        """Tokens of KV that it needs at the same time."""
        return (self.prompt_tokens + self.output_tokens) * self.concurrency


SEGMENTS = (Segment("short", 128, 128, 1, 6), Segment("long", 2048, 512, 1, 2), Segment("stress", 512, 256, 4, 12))


async def run_demo(
    year: str, model: str, changes: dict[str, Any] | None = None, on_segment: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run the three segments in this process and return metrics, segments, thresholds and verdicts, JSON-ready.

    Raises:
        InvalidArgumentError: no such year.
        SageError: the model is missing, damaged, or does not fit.
    """
    if year not in THRESHOLDS:
        raise InvalidArgumentError(f"workload {year!r} is unknown: use one of {', '.join(YEARS)}", param="workload")
    engine = _sized(model, dict(changes or {}), speculate=year == "year3")
    transport = await EmbeddedTransport.start(model, engine=engine)
    try:
        return await _measure(year, transport, on_segment or (lambda _name: None))
    finally:
        await transport.close()


def _sized(model: str, changes: dict[str, Any], *, speculate: bool) -> dict[str, Any]:
    """Return engine changes with a cache for the largest segment, and speculation where the year asks for it."""
    from sagellm_backend.base import BLOCK_SIZE
    from sagellm_core.build import plan_engine

    longest = max(s.prompt_tokens + s.output_tokens for s in SEGMENTS)
    changes = {**changes, "limits": {"n_ctx": longest, "parallel": 4, **changes.get("limits", {})}}
    if speculate:
        changes.setdefault("speculation", {"method": "ngram"})
    plan = plan_engine(compose.engine_config(model, changes))
    tokens = max(s.resident_tokens for s in SEGMENTS) * _SLACK
    blocks = int(tokens // BLOCK_SIZE) + 1
    return {**changes, "cache": {"kv_bytes": blocks * plan.block_bytes, **changes.get("cache", {})}}


async def _measure(year: str, transport: EmbeddedTransport, on_segment: Callable[[str], None]) -> dict[str, Any]:
    (engine,) = transport.house.engines
    description = await engine.describe()
    chat_model = transport.house.manager.chat_model(transport.model)

    def prompt(arrival: Arrival, index: int) -> list[int]:
        words = prompt_of(Arrival(None, arrival.prompt_tokens, 1, arrival.prefix, arrival.shared_tokens), index, 0)
        ids: list[int] = []
        while len(ids) < arrival.prompt_tokens:
            ids += chat_model.tokenize(words, add_special_tokens=False)
        return ids[: arrival.prompt_tokens]

    peaks = _Peaks()
    watcher = asyncio.create_task(peaks.watch(engine.status))
    records: dict[str, list[Record]] = {}
    for segment in SEGMENTS:
        on_segment(segment.name)
        load = closed_loop(
            requests=segment.requests,
            concurrency=segment.concurrency,
            prompt_tokens=segment.prompt_tokens,
            output_tokens=segment.output_tokens,
            shared_tokens=int(segment.prompt_tokens * _SHARED[year]),
        )
        # The first request of a shared beginning computes it: that is the warm-up of a service that is in use.
        warmup = 1 if year != "year1" or segment.name == "short" else 0
        records[segment.name] = await run_workload(transport, transport.model, load, warmup=warmup, prompts=prompt)
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    status = await engine.status()
    metrics = _metrics(records, status, peaks, description.block_size, description.block_bytes)
    verdicts = judge(year, metrics)
    return {
        "workload": year,
        "model": transport.model,
        "backend": description.backend,
        "at": int(time.time()),
        **metrics,
        "segments": {name: _segment(rows) for name, rows in records.items()},
        "kv_capacity_tokens": description.n_blocks * description.block_size,
        "thresholds": THRESHOLDS[year],
        "verdicts": verdicts,
        "passed": all(verdicts.values()),
    }


class _Peaks:
    """The most KV blocks in use at any moment that was looked at (every 10 ms)."""

    def __init__(self) -> None:
        self.blocks = 0

    async def watch(self, status: Callable[[], Any]) -> None:
        while True:
            self.blocks = max(self.blocks, (await status()).blocks_used)
            await asyncio.sleep(0.01)


def _metrics(
    records: dict[str, list[Record]], status: EngineStatus, peaks: _Peaks, block_size: int, block_bytes: int
) -> dict[str, float]:
    everything = [r for rows in records.values() for r in rows]
    short = [r for r in records["short"] if r.ok]
    stress = [r for r in records["stress"] if r.ok]
    span = max((r.end_s for r in stress), default=0.0) - min((r.sent_s for r in stress), default=0.0)
    # With speculation a piece carries several tokens: its gap is shared out among them.
    gaps = [gap * len(r.itl_s) / (r.output_tokens - 1) for r in short if r.output_tokens > 1 for gap in r.itl_s]
    return {
        "ttft_ms": _ms([r.ttft_s for r in short]),
        "tbt_ms": _ms(gaps),
        "tpot_ms": _ms([r.tpot_s for r in short]),
        "throughput_tps": round(sum(r.output_tokens for r in stress) / span, 2) if span > 0 else 0.0,
        "peak_mem_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "error_rate": round(sum(not r.ok for r in everything) / len(everything), 4),
        "kv_used_tokens": peaks.blocks * block_size,
        "kv_used_bytes": peaks.blocks * block_bytes,
        "prefix_hit_rate": _ratio(sum(r.cached_tokens for r in everything), sum(r.prompt_tokens for r in everything)),
        "evict_count": status.evictions,
        "evict_ms": round(status.evict_seconds * 1000, 3),
        "spec_accept_rate": _ratio(status.accepted_tokens, status.draft_tokens),
    }


def _ms(seconds: Sequence[float]) -> float:
    return round(percentile(seconds, 50) * 1000, 3) if seconds else 0.0


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _segment(rows: Sequence[Record]) -> dict[str, Any]:
    good = [r for r in rows if r.ok]
    return {
        "requests": len(rows),
        "failed": len(rows) - len(good),
        "prompt_tokens": sum(r.prompt_tokens for r in good),
        "output_tokens": sum(r.output_tokens for r in good),
        "cached_tokens": sum(r.cached_tokens for r in good),
        "ttft_ms_p50": _ms([r.ttft_s for r in good]),
        "tpot_ms_p50": _ms([r.tpot_s for r in good]),
        "errors": sorted({r.error for r in rows if r.error}),
    }


def judge(year: str, metrics: dict[str, float]) -> dict[str, bool]:
    """Return for each threshold of the year whether the metrics keep it; a latency of nothing measured keeps none."""
    out = {}
    for name, bound in THRESHOLDS[year].items():
        value = metrics[name]
        measured = value > 0 or name in {"error_rate"}
        out[name] = measured and (value >= bound if name in AT_LEAST else value <= bound)
    return out
