"""Tool calls in the formats that model families were trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from sagellm_core.text.parsing.base import CallLog, Marker, Output, OutputParser, PlainText, TextOut
from sagellm_core.text.parsing.json_call import CallScanner, ValueScanner
from sagellm_protocol.generation import FunctionSpec

__all__ = ["BareJson", "FunctionBlocks", "ListedJson", "TaggedJson", "parse_block", "parse_tags"]


_MAX_HEAD = 1000  # a function's name is shorter


class TaggedJson:
    """``<tool_call>{"name": …, "arguments": …}</tool_call>``, any number of them, text between (hermes, qwen)."""

    def __init__(self, calls: CallLog, start: str = "<tool_call>", end: str = "</tool_call>") -> None:
        self._calls, self._start_tag = calls, start
        self._start, self._end = Marker(start), Marker(end)
        self._text = TextOut()
        self._scanner: CallScanner | None = None
        self._closing = False

    def push(self, text: str, out: Output) -> None:
        """Take in more text."""
        while text:
            if self._closing:
                _, found, text = self._end.push(text)
                self._closing = found is None
            elif self._scanner is not None:
                text = self._read(self._scanner, text, out)
            else:
                before, found, text = self._start.push(text)
                self._text.write(before, out)
                if found is not None:
                    self._scanner = CallScanner(self._calls)

    def finish(self, out: Output) -> None:
        """Give up what was held back."""
        if self._scanner is not None and not self._scanner.started:
            self._text.write(self._start_tag + self._scanner.raw, out)
        self._text.write(self._start.flush(), out)
        self._text.finish(out)

    def _read(self, scanner: CallScanner, text: str, out: Output) -> str:
        started = scanner.started
        taken = scanner.feed(text, out)
        if scanner.started and not started:
            self._text.before_call()
        if scanner.done or scanner.failed:
            self._scanner = None
            self._closing = scanner.started
            if not scanner.started:  # it was no call: nothing is lost
                self._text.write(self._start_tag + scanner.raw, out)
        return text[taken:]


class BareJson:
    """A whole answer that is one call object, or several (llama 3, forced calls, models without a format of their own).

    Only the names of the request's tools make an object a call; any other answer, JSON or not, is text.
    """

    def __init__(
        self,
        calls: CallLog,
        names: Collection[str],
        prefixes: Collection[str] = (),
        otherwise: OutputParser | None = None,
    ) -> None:
        """Begin.

        Args:
            calls: numbers the calls.
            names: of the request's tools.
            prefixes: marks that may stand before the first object and are no text, e.g. a code fence.
            otherwise: reads an answer that does not begin with a call.
        """
        self._calls, self._names, self._prefixes = calls, names, tuple(sorted(prefixes, key=len, reverse=True))
        self._otherwise = otherwise or PlainText()
        self._head: list[str] = []
        self._body = ""
        self._listed = False
        self._state: Callable[[str, Output], str] = self._begin
        self._scanner: CallScanner | None = None

    def push(self, text: str, out: Output) -> None:
        """Take in more text."""
        while text:
            text = self._state(text, out)

    def finish(self, out: Output) -> None:
        """Give up what was held back."""
        if self._scanner is not None and not self._scanner.started:
            self._head.append(self._scanner.raw)
        self._give_up(out)
        self._otherwise.finish(out)

    def _begin(self, text: str, out: Output) -> str:
        self._head.append(text)
        self._body = body = (self._body + text).lstrip()
        if any(prefix.startswith(body) for prefix in self._prefixes if prefix != body):
            return ""
        for prefix in self._prefixes:
            if body.startswith(prefix):
                body = body[len(prefix) :].lstrip()
                self._prefixes = ()
                break
        if body.startswith("[") and not self._listed:
            body, self._listed = body[1:].lstrip(), True
        if body.startswith("{"):
            head = "".join(self._head)
            self._head = [head[: len(head) - len(body)]]
            self._state, self._scanner = self._call, CallScanner(self._calls, self._names)
            return body
        self._body = body
        return self._give_up(out) if body else ""

    def _call(self, text: str, out: Output) -> str:
        scanner = self._scanner
        assert scanner is not None
        taken = scanner.feed(text, out)
        if scanner.started:
            self._head = []
        if scanner.done:
            self._state, self._scanner = self._between, None
        elif scanner.failed:
            self._head.append("" if scanner.started else scanner.raw)
            self._scanner = None
            return self._give_up(out) + text[taken:]
        return text[taken:]

    def _between(self, text: str, out: Output) -> str:
        """Separators, the end of a list or a fence, then another call or text."""
        rest = text.lstrip(" \t\r\n;,]`")
        if not rest:
            return ""
        if rest.startswith("{"):
            self._state, self._scanner = self._call, CallScanner(self._calls, self._names)
            return rest
        return self._give_up(out) + rest

    def _give_up(self, out: Output) -> str:
        """All that follows is read otherwise."""
        head, self._head = "".join(self._head), []
        self._state = self._text
        if head:
            self._otherwise.push(head, out)
        return ""

    def _text(self, text: str, out: Output) -> str:
        self._otherwise.push(text, out)
        return ""


class ListedJson:
    """A mark, then a list of call objects, or a name and its arguments (mistral, granite, phi 4)."""

    def __init__(self, calls: CallLog, start: str, end: str = "", arguments_mark: str = "[ARGS]") -> None:
        """Begin.

        Args:
            calls: numbers the calls.
            start: the mark.
            end: a mark that may stand behind a call, or "".
            arguments_mark: stands between a name and its arguments.
        """
        self._calls, self._start_tag, self._arguments_mark = calls, start, arguments_mark
        self._start = Marker(start, *([end] if end else []))
        self._text = TextOut()
        self._state: Callable[[str, Output], str] = self._outside
        self._scanner: CallScanner | None = None
        self._value = ValueScanner()
        self._head = ""

    def push(self, text: str, out: Output) -> None:
        """Take in more text."""
        while text:
            text = self._state(text, out)

    def finish(self, out: Output) -> None:
        """Give up what was held back."""
        if self._scanner is not None and not self._scanner.started:
            self._text.write(self._start_tag + self._head + self._scanner.raw, out)
        elif self._state == self._inside and self._head:
            self._text.write(self._start_tag + self._head, out)
        self._text.write(self._start.flush(), out)
        self._text.finish(out)

    def _outside(self, text: str, out: Output) -> str:
        before, found, rest = self._start.push(text)
        self._text.write(before, out)
        if found == self._start_tag:
            self._state, self._head = self._inside, ""
        return rest

    def _inside(self, text: str, out: Output) -> str:
        """Behind the mark: a list, an object, or a name."""
        self._head += text
        body = self._head.lstrip()
        if body[:1] in ("[", "{"):
            listed = body[0] == "["
            self._head, body = ("[", body[1:]) if listed else ("", body)
            self._state = self._items
            return body
        at = body.find("{")
        if at < 0 and len(self._head) <= _MAX_HEAD:
            return ""
        name = body[: max(at, 0)]
        for mark in (self._arguments_mark, "[CALL_ID]"):
            name = name.partition(mark)[0]
        if not name.strip():
            self._text.write(self._start_tag + self._head, out)
            self._state, self._head = self._outside, ""
            return ""
        self._text.before_call()
        self._calls.begin(name.strip(), out)
        self._state, self._value = self._arguments, ValueScanner()
        return body[at:]

    def _arguments(self, text: str, out: Output) -> str:
        end = self._value.feed(text)
        self._calls.arguments(text[:end], out)
        if self._value.done:
            self._state = self._outside
        return text[end:]

    def _items(self, text: str, out: Output) -> str:
        if self._scanner is None:
            rest = text.lstrip(" \t\r\n,")
            if not rest:
                return ""
            if rest[0] != "{":
                self._state = self._outside
                return rest[1:] if rest[0] == "]" else rest
            self._scanner = CallScanner(self._calls)
            text = rest
        scanner = self._scanner
        started = scanner.started
        taken = scanner.feed(text, out)
        if scanner.started and not started:
            self._text.before_call()
        if scanner.done or scanner.failed:
            self._scanner = None
            if scanner.failed and not scanner.started:
                self._text.write(self._start_tag + self._head + scanner.raw, out)
                self._state = self._outside
            elif self._head != "[":
                self._state = self._outside
            self._head = self._head if scanner.done else ""
        return text[taken:]


Block = Callable[[str], tuple[str, dict[str, Any]] | None]


class FunctionBlocks:
    """Calls in a notation of their own between two marks (function gemma, gemma 4, qwen 3 coder); each comes out whole."""

    def __init__(self, calls: CallLog, start: str, end: str, read: Block) -> None:
        """Begin.

        Args:
            calls: numbers the calls.
            start: the mark before a call.
            end: the mark behind it.
            read: text between the marks -> name and arguments, None if it is no call.
        """
        self._calls, self._start_tag, self._parse = calls, start, read
        self._start, self._end = Marker(start), Marker(end)
        self._text = TextOut()
        self._block: list[str] | None = None

    def push(self, text: str, out: Output) -> None:
        """Take in more text."""
        while text:
            if self._block is None:
                before, found, text = self._start.push(text)
                self._text.write(before, out)
                self._block = [] if found is not None else None
                continue
            before, found, text = self._end.push(text)
            self._block.append(before)
            if found is not None:
                self._read("".join(self._block), found, out)
                self._block = None

    def finish(self, out: Output) -> None:
        """Give up what was held back."""
        if self._block is not None:
            self._read("".join(self._block) + self._end.flush(), "", out)
        self._text.write(self._start.flush(), out)
        self._text.finish(out)

    def _read(self, block: str, end: str, out: Output) -> None:
        parsed = self._parse(block)
        if parsed is None:
            self._text.write(self._start_tag + block + end, out)
            return
        self._text.before_call()
        self._calls.begin(parsed[0], out)
        self._calls.arguments(json.dumps(parsed[1], ensure_ascii=False), out)


_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?")


def parse_tags(block: str, tools: Collection[FunctionSpec]) -> tuple[str, dict[str, Any]] | None:
    """Return name and arguments of ``<function=name><parameter=key>value</parameter></function>``, None if it is malformed.

    Values are text where the tool's schema says so, or says nothing, and JSON else.
    """
    match = _FUNCTION.fullmatch(block)
    if match is None:
        return None
    name, body = match[1], match[2]
    schema = next((tool.parameters for tool in tools if tool.name == name), None) or {}
    known = schema.get("properties")
    out: dict[str, Any] = {}
    at = 0
    while key := _PARAMETER.match(body, at):
        end = body.find("</parameter>", key.end())
        if end < 0:
            return None
        value = body[key.end() : end].removesuffix("\n")
        out[key[1]] = _typed(value, known.get(key[1]) if isinstance(known, dict) else None)
        at = end + len("</parameter>")
    return (name, out) if not body[at:].strip() else None


def _typed(value: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind is None or kind == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


_BLOCK = re.compile(r"\s*call:\s*([^\s{]+)\s*(\{.*\})\s*", re.DOTALL)
_MAX_DEPTH = 100


def parse_block(block: str, quote: str) -> tuple[str, dict[str, Any]] | None:
    """Return name and arguments of ``call:name{key:<quote>text<quote>,n:1}``, None if it is malformed."""
    match = _BLOCK.fullmatch(block)
    if match is None:
        return None
    try:
        value, end = _block_value(match[2], 0, quote, 0)
    except ValueError:
        return None
    return (match[1], value) if isinstance(value, dict) and end == len(match[2]) else None


def _block_value(text: str, at: int, quote: str, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    at = _past_space(text, at)
    if text.startswith(quote, at):
        end = text.find(quote, at + len(quote))
        if end < 0:
            raise ValueError("a string does not end")
        return text[at + len(quote) : end], end + len(quote)
    if text[at : at + 1] in ("{", "["):
        return _block_items(text, at, quote, depth)
    end = at
    while end < len(text) and text[end] not in ",}]":
        end += 1
    word = text[at:end].strip()
    if not word:
        raise ValueError("a value is missing")
    try:
        return json.loads(word), end
    except ValueError:
        return word, end


def _block_items(text: str, at: int, quote: str, depth: int) -> tuple[Any, int]:
    table: dict[str, Any] | None = {} if text[at] == "{" else None
    items: list[Any] = []
    close = "}" if table is not None else "]"
    at = _past_space(text, at + 1)
    while not text.startswith(close, at):
        if table is not None:
            key, at = _block_key(text, at, quote)
            table[key], at = _block_value(text, at, quote, depth + 1)
        else:
            value, at = _block_value(text, at, quote, depth + 1)
            items.append(value)
        at = _past_space(text, at)
        if text.startswith(",", at):
            at = _past_space(text, at + 1)
        elif not text.startswith(close, at):
            raise ValueError("a separator is missing")
    return (items if table is None else table), at + 1


def _block_key(text: str, at: int, quote: str) -> tuple[str, int]:
    if text.startswith(quote, at):
        end = text.find(quote, at + len(quote))
        key, colon = text[at + len(quote) : end], end + len(quote)
    else:
        colon = text.find(":", at)
        key = text[at:colon].strip()
    if colon < 0 or not text.startswith(":", colon):
        raise ValueError("a key has no value")
    return key, colon + 1


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
