"""What several commands share: the typer settings, sizes and tables in plain text, JSON output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

__all__ = ["JsonOption", "ProgressBar", "human_bytes", "new_app", "print_json", "print_table", "single"]

_F = TypeVar("_F", bound=Callable[..., None])

JsonOption = typer.Option("--json", help="Print JSON.")


class GroupedCommand(TyperCommand):
    """A command whose options are listed in their groups (``rich_help_panel``), in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options without a group, then each group."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (row := parameter.get_help_record(ctx)) is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(row)
        for name, rows in groups.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


def new_app() -> typer.Typer:
    """Return a typer application with our settings: plain help, our own error handling."""
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=False
    )


def single(function: _F) -> typer.Typer:
    """Return an application whose only command is `function`."""
    app = new_app()
    app.command(cls=GroupedCommand)(function)
    return app


def human_bytes(count: float) -> str:
    """Return ``98.4 MB`` for 98362432: powers of ten, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def print_json(value: Any) -> None:
    """Write `value` as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write aligned columns; the last one is not padded."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class ProgressBar:
    """A progress line with rate and time left on a terminal; one line a phase where the output is not one."""

    def __init__(self) -> None:
        self._what = ""
        self._started = 0.0
        self._drawn = 0.0
        self._terminal = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of `what` are there; 0 of 0 means that the size is not known yet."""
        now = time.monotonic()
        if what != self._what:
            self.finish()
            self._what, self._started, self._drawn = what, now, 0.0
            if not self._terminal:
                sys.stderr.write(f"{what}\n")
        if self._terminal and (now - self._drawn >= 0.1 or done == total):
            self._drawn = now
            sys.stderr.write(f"\r\x1b[2K{what}{self._numbers(done, total, now - self._started)}")
            sys.stderr.flush()

    @staticmethod
    def _numbers(done: int, total: int, seconds: float) -> str:
        if not total:
            return " …"
        filled = 24 * done // total
        rate = done / seconds if seconds > 0 else 0.0
        left = f" {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        return f" [{'#' * filled}{'.' * (24 - filled)}] {human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s{left}"

    def finish(self) -> None:
        """End the line."""
        if self._what and self._terminal:
            sys.stderr.write("\n")
        self._what = ""
