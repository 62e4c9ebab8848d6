"""Token bytes -> text as it becomes certain: whole characters only, nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["StopMatcher", "Utf8Stream"]


class Utf8Stream:
    """Incremental UTF-8. The pieces together equal ``bytes.decode("utf-8", "replace")`` of all bytes, however they are cut."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """Return the characters that `data` completes."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return U+FFFD if a character was left unfinished."""
        return self._decoder.decode(b"", True)


class StopMatcher:
    """Finds stop strings across pieces; linear time (Knuth, Morris & Pratt, 1977).

    The first stop string to be complete wins, of two that end together the longer one. The result does not depend on how the
    text is cut. After a match, `matched` is the string and `rest` what follows it in the same piece.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None
        self.rest = ""

    def push(self, text: str) -> str:
        """Return what of the text so far is certainly output. After a match, `matched` is set and nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        buffer, start = self._held + text, len(self._held)
        for index in range(start, len(buffer)):
            stop = self._advance(buffer[index])
            if stop is not None:
                self.matched, self._held, self.rest = stop, "", buffer[index + 1 :]
                return buffer[: index + 1 - len(stop)]
        keep = len(buffer) - max(self._states)
        self._held = buffer[keep:]
        return buffer[:keep]

    def flush(self) -> str:
        """Return what was held back: no stop string can come of it any more."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for number, stop in enumerate(self._stops):
            table, state = self._tables[number], self._states[number]
            while state and stop[state] != char:
                state = table[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                found = found or stop
                state = table[state - 1]
            self._states[number] = state
        return found


def _failure_table(pattern: str) -> list[int]:
    """For each prefix the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    state = 0
    for index in range(1, len(pattern)):
        while state and pattern[index] != pattern[state]:
            state = table[state - 1]
        if pattern[index] == pattern[state]:
            state += 1
        table[index] = state
    return table
