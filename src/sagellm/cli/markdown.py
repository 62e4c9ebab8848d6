"""Markdown on a terminal as it streams: no redrawing, so that resizing and scrolling never tear it."""

from __future__ import annotations

import re

__all__ = ["Renderer"]

_RESET = "\x1b[0m"
_BOLD, _ITALIC, _DIM, _CODE, _HEAD = "1", "3", "2", "36", "1;34"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HEADING, _BULLET = re.compile(r"#{1,6} +"), re.compile(r"( *)[-*+] ")
_UNDECIDED = re.compile(r"(#{1,6} *| *[-+*]?| {0,3}`{1,2}|`{3}[^\n]*)\Z")


class Renderer:
    """Turns pieces of Markdown into text with colours; only a marker that is not complete yet is held back.

    With ``colour=False`` the text passes through unchanged but for control characters. They are dropped in either case: a model
    cannot move the cursor or retitle the window.
    """

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour
        self._held = ""
        self._line_start = True
        self._fenced = False
        self._line_style = ""
        self._inline: list[str] = []

    def push(self, text: str) -> str:
        """Return what can be shown after `text` was added."""
        text = _CONTROL.sub("", text.replace("\r\n", "\n"))
        if not self._colour:
            return text
        text, self._held = self._held + text, ""
        out: list[str] = []
        while text:
            text = self._begin_line(text, out) if self._line_start else self._go_on(text, out)
            if self._held:
                break
        return "".join(out)

    def finish(self) -> str:
        """Return what was held back, and end all styles."""
        rest = self._held
        plain = not (self._line_style or self._inline or self._fenced)
        self._held, self._line_start, self._fenced, self._line_style, self._inline = "", True, False, "", []
        return rest if plain else rest + _RESET

    def _begin_line(self, text: str, out: list[str]) -> str:
        """Decide what kind of line begins; return what is left of `text`."""
        if _UNDECIDED.fullmatch(text):
            self._held = text
            return text
        self._line_start = False
        if text.startswith("```"):
            self._fenced = not self._fenced
            line, newline, rest = text.partition("\n")
            out.append(self._styled(_DIM, line) + newline)
            self._line_start = True
            return rest
        if self._fenced:
            self._open(_CODE, out)
            return text
        if match := _HEADING.match(text):
            self._open(_HEAD, out)
            return text[match.end() :]
        if match := _BULLET.match(text):
            out.append(f"{match[1]}• ")
            return text[match.end() :]
        if text.startswith(">"):
            self._open(_DIM, out)
        return text

    def _go_on(self, text: str, out: list[str]) -> str:
        stop = re.search(r"\n" if self._fenced else r"[\n`*]", text)
        if stop is None:
            out.append(text)
            return ""
        out.append(text[: stop.start()])
        mark, rest = stop.group(), text[stop.start() :]
        if mark == "\n":
            out.append((_RESET if self._line_style or self._inline else "") + "\n")
            self._line_start, self._line_style, self._inline = True, "", []
            return rest[1:]
        if mark == "`":
            self._toggle(_CODE, out)
            return rest[1:]
        if len(rest) == 1:
            self._held = rest
            return rest
        if rest.startswith("**"):
            self._toggle(_BOLD, out)
            return rest[2:]
        if _ITALIC in self._inline or not rest[1].isspace():
            self._toggle(_ITALIC, out)
        else:
            out.append("*")
        return rest[1:]

    def _open(self, style: str, out: list[str]) -> None:
        self._line_style = style
        out.append(f"\x1b[{style}m")

    def _toggle(self, style: str, out: list[str]) -> None:
        if style in self._inline:
            self._inline.remove(style)
        else:
            self._inline.append(style)
        active = ";".join(filter(None, [self._line_style, *self._inline]))
        out.append(f"{_RESET}\x1b[{active}m" if active else _RESET)

    @staticmethod
    def _styled(style: str, line: str) -> str:
        return f"\x1b[{style}m{line}{_RESET}"
