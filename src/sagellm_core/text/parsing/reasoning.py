"""Reasoning before the answer: ``<think>…</think>`` and its kin."""

from __future__ import annotations

from sagellm_core.text.parsing.base import Marker, Output, OutputParser, TextOut

__all__ = ["ReasoningParser"]


class ReasoningParser:
    """Splits off the reasoning at the beginning of an answer; the same marks further on are text.

    White space around reasoning is layout and goes away.
    """

    def __init__(self, start: str, end: str, inner: OutputParser, *, opened: bool) -> None:
        """Begin.

        Args:
            start: the mark before reasoning.
            end: the mark behind it.
            inner: reads the answer.
            opened: the prompt ends with `start`, so that the output begins with reasoning.
        """
        self._start, self._inner = start, inner
        self._end = Marker(end)
        self._text = TextOut()
        self._state = "fresh" if opened else "before"
        self._head: list[str] = []
        self._body = ""

    def push(self, text: str, out: Output) -> None:
        """Take in more text."""
        while text:
            if self._state == "answer":
                self._inner.push(text, out)
                return
            text = self._step(text, out)

    def finish(self, out: Output) -> None:
        """Give up what was held back."""
        if self._state == "before" and self._head:
            self._inner.push("".join(self._head), out)
        elif self._state in ("fresh", "thinking"):
            self._reason(self._end.flush(), out)
        self._inner.finish(out)

    def _step(self, text: str, out: Output) -> str:
        if self._state == "before":
            return self._before(text)
        if self._state == "after":
            rest = text.lstrip()
            self._state = "answer" if rest else "after"
            return rest
        before, found, rest = self._end.push(text)
        self._reason(before, out)
        if found is not None:
            self._state = "after"
        return rest

    def _before(self, text: str) -> str:
        self._head.append(text)
        self._body = (self._body + text).lstrip()
        if self._body.startswith(self._start):
            self._state, self._head = "fresh", []
            return self._body[len(self._start) :]
        if self._start.startswith(self._body):
            return ""
        head, self._head, self._state = "".join(self._head), [], "answer"
        return head

    def _reason(self, text: str, out: Output) -> None:
        """Write reasoning: leading white space goes, trailing white space waits for more."""
        if self._state == "fresh":
            text = text.lstrip()
            self._state = "thinking" if text else "fresh"
        part = Output()
        self._text.write(text, part)
        out.reasoning += part.text
