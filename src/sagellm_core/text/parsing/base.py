"""The parts that all output parsers share."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sagellm_core.text.stream import StopMatcher
from sagellm_protocol.generation import ToolCallDelta

__all__ = ["CallLog", "Marker", "Output", "OutputParser", "PlainText", "TextOut", "call_id", "mistral_call_id"]


@dataclass(slots=True)
class Output:
    """What one push gave; parsers append to it."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)


class OutputParser(Protocol):
    """Text of the model -> `Output`."""

    def push(self, text: str, out: Output) -> None:
        """Take in more text."""
        ...

    def finish(self, out: Output) -> None:
        """Give up what was held back: nothing more comes."""
        ...


class PlainText:
    """No parsing."""

    def push(self, text: str, out: Output) -> None:
        """Take in more text."""
        out.text += text

    def finish(self, out: Output) -> None:
        """Do nothing."""


def call_id() -> str:
    """Return a fresh id of a tool call."""
    return f"call_{secrets.token_hex(12)}"


def mistral_call_id() -> str:
    """Return a fresh id as mistral's templates insist on: nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class CallLog:
    """Numbers the tool calls of one choice."""

    def __init__(self, make_id: Callable[[], str] = call_id) -> None:
        self._make_id = make_id
        self.count = 0

    def begin(self, name: str, out: Output) -> None:
        """A call of `name` begins."""
        out.calls.append(ToolCallDelta(index=self.count, id=self._make_id(), name=name))
        self.count += 1

    def arguments(self, text: str, out: Output) -> None:
        """More of the newest call's arguments."""
        index = self.count - 1
        last = out.calls[-1] if out.calls else None
        if last is not None and last.index == index:
            out.calls[-1] = ToolCallDelta(index=index, id=last.id, name=last.name, arguments=last.arguments + text)
        else:
            out.calls.append(ToolCallDelta(index=index, arguments=text))


class TextOut:
    """Text around tool calls: white space next to a call is layout and goes away."""

    def __init__(self) -> None:
        self._space = ""
        self._after_call = False

    def write(self, text: str, out: Output) -> None:
        """More text; trailing white space waits for what follows."""
        body = text.rstrip()
        if not body:
            self._space += text
            return
        out.text += body.lstrip() if self._after_call else self._space + body
        self._space, self._after_call = text[len(body) :], False

    def before_call(self) -> None:
        """A call begins here."""
        self._space, self._after_call = "", True

    def finish(self, out: Output) -> None:
        """The end: white space after the last text is text."""
        if not self._after_call:
            out.text += self._space
        self._space = ""


class Marker:
    """Waits for one of some strings; what stands before it comes out as it becomes certain."""

    def __init__(self, *strings: str) -> None:
        self._strings = strings
        self._matcher = StopMatcher(strings)

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Return the text before the marker, the marker if it was found, and what follows it."""
        before = self._matcher.push(text)
        found = self._matcher.matched
        rest = self._matcher.rest
        if found is not None:
            self._matcher = StopMatcher(self._strings)
        return before, found, rest

    def flush(self) -> str:
        """Return what was held back."""
        return self._matcher.flush()
