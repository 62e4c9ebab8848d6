"""Tool calls as JSON: ``{"name": …, "arguments": …}`` read as it comes in, so that arguments stream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from sagellm_core.text.parsing.base import CallLog, Output

__all__ = ["CallScanner", "ValueScanner"]

_IN_STRING = re.compile(r'[^"\\]*')
_IN_NESTED = re.compile(r'[^"{}\[\]]*')
_IN_SCALAR = re.compile(r"[^,}\]\s]*")
_SPACE = re.compile(r"\s*")
_ARGUMENT_KEYS = ("arguments", "parameters")


class ValueScanner:
    """Finds the end of one JSON object or array. Brackets and strings are followed, nothing else is checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.done = False

    def feed(self, text: str, at: int = 0) -> int:
        """Return where in `text` the value ends, or its length."""
        while at < len(text) and not self.done:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_IN_STRING if self._in_string else _IN_NESTED).match(text, at)
            at = match.end() if match else at
            if at < len(text):
                self._on(text[at])
                at += 1
        return at

    def _on(self, char: str) -> None:
        if self._in_string:
            self._escaped = char == "\\"
            self._in_string = self._escaped
        elif char == '"':
            self._in_string = True
        else:
            self._depth += 1 if char in "{[" else -1
            self.done = self._depth <= 0


class CallScanner:
    """Reads one call object. The call begins when its name is known; arguments that stand before the name wait for it.

    `failed` says that this is no call (no object, no name, an unknown name); then `raw` is all that was read, unless the call had
    `started`.
    """

    def __init__(self, calls: CallLog, names: Collection[str] | None = None) -> None:
        """Begin.

        Args:
            calls: numbers the call.
            names: what a call may be named; None allows any name.
        """
        self._calls, self._names = calls, names
        self._state: Callable[[str, int, Output], int] = self._open
        self._key = ""
        self._buffer: list[str] = []
        self._escaped = False
        self._early: list[str] = []
        self._had_arguments = False
        self._value = ValueScanner()
        self._raw: list[str] = []
        self.started = self.done = self.failed = False

    @property
    def raw(self) -> str:
        """What was read before the call started."""
        return "".join(self._raw)

    def feed(self, text: str, out: Output) -> int:
        """Read from the beginning of `text`; return how many characters were taken."""
        at = 0
        while at < len(text) and not (self.done or self.failed):
            at = self._state(text, at, out)
        if not self.started:
            self._raw.append(text[:at])
        return at

    # Each state takes text from `at` and returns where it stopped.

    def _open(self, text: str, at: int, _: Output) -> int:
        return self._expect(text, at, "{", self._next_key)

    def _next_key(self, text: str, at: int, out: Output) -> int:
        at = _skip(text, at)
        if at == len(text):
            return at
        if text[at] == ",":
            return at + 1
        if text[at] == "}":
            self._end(out)
            return at + 1
        return self._expect(text, at, '"', self._in_key)

    def _in_key(self, text: str, at: int, _: Output) -> int:
        at, closed = self._string(text, at)
        if closed:
            self._key = self._decoded() or ""
            self._state = self._colon
        return at

    def _colon(self, text: str, at: int, _: Output) -> int:
        return self._expect(text, at, ":", self._begin_value)

    def _begin_value(self, text: str, at: int, _: Output) -> int:
        at = _skip(text, at)
        if at == len(text):
            return at
        char = text[at]
        if self._key == "name" and char != '"':
            self.failed = True
            return at
        if char == '"':
            self._state = self._in_string
            return at + 1
        if char in "{[":
            self._value = ValueScanner()
            self._state = self._nested
        else:
            self._state = self._scalar
        return at

    def _in_string(self, text: str, at: int, out: Output) -> int:
        at, closed = self._string(text, at)
        if closed:
            self._state = self._next_key
            value = self._decoded()
            if self._key == "name":
                self._name(value, out)
            elif self._key in _ARGUMENT_KEYS and value is not None:
                self._arguments(value or "{}", out)  # some models put the object's text into a string
        return at

    def _nested(self, text: str, at: int, out: Output) -> int:
        end = self._value.feed(text, at)
        if self._key in _ARGUMENT_KEYS:
            self._arguments(text[at:end], out)
        if self._value.done:
            self._state = self._next_key
        return end

    def _scalar(self, text: str, at: int, out: Output) -> int:
        match = _IN_SCALAR.match(text, at)
        end = match.end() if match else at
        self._buffer.append(text[at:end])
        if end < len(text):
            value, self._buffer = "".join(self._buffer), []
            if self._key in _ARGUMENT_KEYS and value != "null":
                self._arguments(value, out)
            self._state = self._next_key
            if not value:
                self.failed = True
        return end

    def _expect(self, text: str, at: int, char: str, then: Callable[[str, int, Output], int]) -> int:
        at = _skip(text, at)
        if at == len(text):
            return at
        if text[at] != char:
            self.failed = True
            return at
        self._state = then
        return at + 1

    def _string(self, text: str, at: int) -> tuple[int, bool]:
        """Collect a string's raw text; whether its closing quote was reached."""
        start = at
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = _IN_STRING.match(text, at)
            at = match.end() if match else at
            if at < len(text):
                if text[at] == '"':
                    self._buffer.append(text[start:at])
                    return at + 1, True
                self._escaped = True
                at += 1
        self._buffer.append(text[start:at])
        return at, False

    def _decoded(self) -> str | None:
        raw, self._buffer = "".join(self._buffer), []
        try:
            return str(json.loads(f'"{raw}"', strict=False))
        except ValueError:
            return None

    def _name(self, name: str | None, out: Output) -> None:
        if not name or self.started or (self._names is not None and name not in self._names):
            self.failed = True
            return
        self.started = True
        self._calls.begin(name, out)
        if self._early:
            self._calls.arguments("".join(self._early), out)
            self._early = []

    def _arguments(self, text: str, out: Output) -> None:
        self._had_arguments = True
        if self.started:
            self._calls.arguments(text, out)
        else:
            self._early.append(text)

    def _end(self, out: Output) -> None:
        if not self.started:
            self.failed = True
            return
        if not self._had_arguments:
            self._calls.arguments("{}", out)
        self.done = True


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
