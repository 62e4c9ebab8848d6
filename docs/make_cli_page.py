"""Write docs/cli.md from the commands themselves. Run: python docs/make_cli_page.py. A test compares the page with the code."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import typer

from sagellm.cli.main import COMMANDS

HEAD = """# Command line

Written by `docs/make_cli_page.py` from the code. `sage-llm COMMAND --help` says the same; `--debug` before or after any command
shows tracebacks.
"""


def page() -> str:
    """Return the page."""
    out = [HEAD]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        out.append(f"## {group}\n")
        for name, command in COMMANDS.items():
            if command.group != group:
                continue
            out.append(f"### sage-llm {name}\n\n{command.help}.\n")
            if command.entry == "app":
                root: Any = typer.main.get_command(importlib.import_module(command.module).app)
                subs: dict[str, Any] = getattr(root, "commands", {})
                if not subs:
                    out.append(options(root))
                for sub, it in subs.items():
                    out.append(f"#### sage-llm {name} {sub}\n\n{it.help.strip()}\n\n{options(it)}")
    return "\n".join(out)


def options(command: Any) -> str:
    """Return the table of a command's arguments and options."""
    rows = []
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        flags = ", ".join(parameter.opts) if parameter.opts[0].startswith("-") else parameter.name.upper()
        text = (parameter.help or "").replace("|", "\\|")
        rows.append(f"| `{flags}` | {text} |")
    return "\n".join(["| option | what |", "|---|---|", *rows, ""]) if rows else ""


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), encoding="utf-8")
