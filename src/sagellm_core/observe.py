"""What an engine says about itself: its description, and its status."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm_core.metrics import rss_bytes
from sagellm_protocol.engine import EngineDescription, EngineStatus

if TYPE_CHECKING:
    from sagellm_backend.base import Runner
    from sagellm_core.kv_cache import KVCache
    from sagellm_core.metrics import EngineMetrics
    from sagellm_core.scheduler import Scheduler
    from sagellm_core.spill import DiskTier

__all__ = ["EngineSettings", "description", "status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is told besides its runner.

    Attributes:
        engine_id: unique in a control plane.
        model: the name it is served under.
        n_ctx: most tokens of one sequence, prompt and output.
        max_running: sequences that run at the same time.
        max_rows: rows of a step.
        max_logit_rows: rows of a step whose next token can be drawn.
        max_waiting: sequences that may queue.
        ageing_s: seconds of age that count as much as one priority band.
        max_failures: steps in a row that may fail before the engine is dead.
        prefix_caching: keep blocks of ended sequences findable.
        adapter_bytes: hard cap for the factors of all LoRA adapters together.
        backend, device, quantization, model_path: for `describe`.
    """

    engine_id: str
    model: str
    n_ctx: int
    max_running: int = 16
    max_rows: int = 512
    max_logit_rows: int = 32
    max_waiting: int = 4096
    ageing_s: float = 30.0
    max_failures: int = 3
    prefix_caching: bool = True
    adapter_bytes: int = 1 << 30
    backend: str = ""
    device: str = ""
    quantization: str = ""
    model_path: str = ""


def description(settings: EngineSettings, runner: Runner) -> EngineDescription:
    """Return what an engine serves; fixed while it lives."""
    from sagellm_backend.base import BLOCK_SIZE

    spec = runner.spec
    return EngineDescription(
        engine_id=settings.engine_id,
        model=settings.model,
        architecture=spec.architecture,
        backend=settings.backend,
        device=settings.device,
        vocab_size=spec.vocab_size,
        context_length=settings.n_ctx,
        block_size=BLOCK_SIZE,
        n_blocks=runner.kv.n_blocks,
        max_batch_tokens=settings.max_rows,
        max_sequences=settings.max_running,
        quantization=settings.quantization,
        pid=os.getpid(),
        model_path=settings.model_path,
        block_bytes=runner.kv.block_bytes,
        weight_bytes=runner.weight_bytes,
    )


def status(
    settings: EngineSettings,
    metrics: EngineMetrics,
    kv: KVCache,
    scheduler: Scheduler,
    spill: DiskTier | None,
    *,
    pooling: tuple[int, int],
    draining: bool,
    adapters: tuple[str, ...],
) -> EngineStatus:
    """Return what an engine is doing; reads plain numbers only, so that any thread may ask at any time.

    `pooling` is how many embedding inputs run and how many wait.
    """
    return EngineStatus(
        engine_id=settings.engine_id,
        running=len(scheduler.running) + pooling[0],
        waiting=len(scheduler.waiting) + pooling[1],
        blocks_total=kv.n_blocks,
        blocks_used=kv.n_used,
        blocks_cached=kv.n_cached,
        steps=metrics.steps,
        prompt_tokens=metrics.prompt_tokens,
        generation_tokens=metrics.generation_tokens,
        prefix_queries=kv.counters.queried_tokens,
        prefix_hits=kv.counters.hit_tokens,
        preemptions=scheduler.preemptions,
        evictions=kv.counters.evictions,
        aborted=metrics.aborted,
        finished=metrics.finished,
        failed=metrics.failed,
        draft_tokens=metrics.draft_tokens,
        accepted_tokens=metrics.accepted_tokens,
        rss_bytes=rss_bytes(),
        step_seconds=metrics.step_seconds,
        draining=draining,
        evict_seconds=kv.counters.evict_seconds,
        copied_blocks=kv.counters.copied_blocks,
        blocks_spilled=spill.n_blocks if spill is not None else 0,
        spill_bytes=spill.n_bytes if spill is not None else 0,
        spill_hits=kv.counters.spill_hits,
        spill_errors=spill.errors if spill is not None else 0,
        histograms=metrics.histograms(),
        adapters=adapters,
    )
