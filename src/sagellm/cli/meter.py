"""What one answer took: measured from the start of the process, for ``run --verbose``."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from sagellm.results import Delta

__all__ = ["Meter", "process_age_s", "resident_bytes"]


def process_age_s() -> float:
    """Return the seconds since this process was started (proc(5): field 22 of /proc/self/stat, in clock ticks since boot)."""
    stat = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return uptime - int(stat[19]) / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """Return the peak resident memory of this process (getrusage(2); Linux counts in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Meter:
    """Times of one answer, in seconds; of a conversation's, which waits for its reader, not that since the command."""

    def __init__(self, *, conversation: bool = False) -> None:
        self._conversation = conversation
        self._base = time.perf_counter() - process_age_s()
        self._asked = time.perf_counter()
        self._first: float | None = None
        self._last = 0.0
        self._usage: dict[str, int] = {}
        self._pieces = 0

    def asked(self) -> None:
        """A question goes out now."""
        self._asked, self._first, self._usage, self._pieces = time.perf_counter(), None, {}, 0

    def saw(self, delta: Delta) -> None:
        """Count a piece of the answer."""
        now = time.perf_counter()
        if delta.text or delta.reasoning or delta.tool_calls:
            self._first = self._first or now
            self._last = now
            self._pieces += 1
        if delta.usage:
            self._usage = delta.usage

    @property
    def tokens(self) -> int:
        """Tokens of the answer, as the engine counted them; of one that was stopped the pieces that came, mostly a token each."""
        return self._usage.get("completion_tokens", self._pieces)

    @property
    def rate(self) -> float:
        """Tokens a second after the first one; 0 where there were fewer than two."""
        spent = self._last - (self._first or self._last)
        return (self.tokens - 1) / spent if spent > 0 and self.tokens > 1 else 0.0

    def report(self, human_bytes: Callable[[float], str]) -> str:
        """Return the numbers, one a line."""
        first = self._first or time.perf_counter()
        prompt = f" ({self._usage['prompt_tokens']} prompt tokens)" if "prompt_tokens" in self._usage else ""
        since_command = () if self._conversation else (f"command to first token  {first - self._base:.2f} s",)
        return "\n".join(
            (
                *since_command,
                f"question to first token {1000 * (first - self._asked):.0f} ms{prompt}",
                f"decode                  {self.rate:.1f} tokens/s ({self.tokens} tokens)",
                f"peak resident memory    {human_bytes(resident_bytes())}",
            )
        )
