"""What an engine measures about itself: counters and histograms, never constants."""

from __future__ import annotations

import os
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

from sagellm_core.request import SequenceState
from sagellm_protocol.engine import Histogram

__all__ = ["EngineMetrics", "Recorder", "rss_bytes"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)


class Recorder:
    """A histogram that is being filled."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value`."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> Histogram:
        """Return what was observed so far."""
        return Histogram(bounds=self._bounds, counts=tuple(self._counts), sum=self._sum)


def _seconds() -> Recorder:
    return Recorder(_SECONDS)


@dataclass(slots=True)
class EngineMetrics:
    """Counters grow while the engine lives; times are seconds."""

    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    aborted: int = 0
    finished: int = 0
    failed: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    ttft: Recorder = field(default_factory=_seconds)
    tpot: Recorder = field(default_factory=_seconds)
    itl: Recorder = field(default_factory=_seconds)
    queue: Recorder = field(default_factory=_seconds)
    step: Recorder = field(default_factory=_seconds)
    rows: Recorder = field(default_factory=lambda: Recorder(_ROWS))

    def on_start(self, seq: SequenceState, now: float) -> None:
        """Note that `seq` got its first rows."""
        if seq.started_at is None:
            seq.started_at = now
            self.queue.observe(now - seq.queued_at)
            self.prompt_tokens += seq.n_prompt

    def on_tokens(self, seq: SequenceState, n_tokens: int, now: float) -> None:
        """Note that `seq` gained `n_tokens` in one step."""
        self.generation_tokens += n_tokens
        if seq.first_token_at is None or seq.last_token_at is None:
            seq.first_token_at = now
            self.ttft.observe(now - seq.queued_at)
        else:
            self.itl.observe(now - seq.last_token_at)
        seq.last_token_at = now

    def on_step(self, n_rows: int, seconds: float) -> None:
        """Note that a step of `n_rows` rows took `seconds`."""
        self.steps += 1
        self.step_seconds += seconds
        self.step.observe(seconds)
        self.rows.observe(n_rows)

    def on_end(self, seq: SequenceState) -> None:
        """Note that `seq` ended by itself."""
        emitted = seq.n_output - len(seq.request.emitted_token_ids)
        if emitted > 1 and seq.first_token_at is not None and seq.last_token_at is not None:
            self.tpot.observe((seq.last_token_at - seq.first_token_at) / (emitted - 1))

    def histograms(self) -> dict[str, Histogram]:
        """Return all histograms by name."""
        return {
            "ttft_s": self.ttft.snapshot(),
            "tpot_s": self.tpot.snapshot(),
            "itl_s": self.itl.snapshot(),
            "queue_s": self.queue.snapshot(),
            "step_s": self.step.snapshot(),
            "batch_rows": self.rows.snapshot(),
        }


def rss_bytes() -> int:
    """Return the resident bytes of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
