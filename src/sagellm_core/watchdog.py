"""Ends a process whose engine makes no progress, with the stacks of all threads on stderr.

The timer runs in C (`faulthandler`), so it fires even when a native step hangs while it holds the interpreter lock, which no Python thread
would live to see.
"""

from __future__ import annotations

import faulthandler
from typing import TextIO

__all__ = ["Watchdog"]


class Watchdog:
    """Exits with status 1 when work makes no progress, or when nobody reports, for `limit_s` seconds.

    One at a time in a process: `faulthandler` has one timer.
    """

    def __init__(self, limit_s: float, file: TextIO) -> None:
        self._limit_s = limit_s
        self._file = file
        self._progress = -1

    def report(self, progress: int, *, busy: bool) -> None:
        """Tell how far the engine is; `progress` is any counter that grows with the work.

        Called more often than `limit_s`. An idle engine needs no progress, but whoever reports must be alive.
        """
        if busy and progress == self._progress:
            return
        self._progress = progress
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=self._file)

    def stop(self) -> None:
        """Disarm it."""
        faulthandler.cancel_dump_traceback_later()
