"""What a command takes, read from its own parser: for the reference page and for completion in shells."""

from __future__ import annotations

import argparse
import importlib
from typing import Any, NamedTuple

from sagellm.cli.main import Command

__all__ = ["Parameter", "parameters_of", "subcommands_of"]


class Parameter(NamedTuple):
    """One argument or option: its flags (an argument has none), its name, what it is, and the group that it stands in."""

    flags: tuple[str, ...]
    name: str
    help: str
    group: str = ""


def subcommands_of(command: Command) -> dict[str, Any]:
    """Return the typer commands below `command`, by name; empty where it is a command itself."""
    if command.entry != "app":
        return {}
    commands: dict[str, Any] = getattr(_root(command), "commands", {})
    return commands


def parameters_of(command: Command, sub: str | None = None) -> list[Parameter]:
    """Return what `command`, or its subcommand `sub`, takes; what is hidden and ``--help`` are left out."""
    if command.parser:
        parser: argparse.ArgumentParser = getattr(importlib.import_module(command.module), command.parser)()
        return [
            Parameter(tuple(action.option_strings), action.dest, (action.help or "").replace("%%", "%"))
            for action in parser._actions  # argparse has no public list of them
            if action.dest != "help"
        ]
    it = subcommands_of(command)[sub] if sub else _root(command)
    return [
        Parameter(
            (*p.opts, *p.secondary_opts) if p.opts[0].startswith("-") else (),
            str(p.name),
            getattr(p, "help", None) or "",
            getattr(p, "rich_help_panel", None) or "",
        )
        for p in it.params
        if p.name != "help" and not getattr(p, "hidden", False)
    ]


def _root(command: Command) -> Any:
    import typer

    return typer.main.get_command(getattr(importlib.import_module(command.module), command.entry))
