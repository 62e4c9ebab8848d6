"""Write docs/cli.md from the commands themselves. Run: python docs/make_cli_page.py. A test compares the page with the code."""

from __future__ import annotations

from pathlib import Path

from sagellm.cli.main import COMMANDS
from sagellm.cli.parameters import Parameter, parameters_of, subcommands_of

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
            subs = subcommands_of(command)
            if not subs:
                out.append(options(parameters_of(command)))
            for sub, it in subs.items():
                out.append(f"#### sage-llm {name} {sub}\n\n{it.help.strip()}\n\n{options(parameters_of(command, sub))}")
    return "\n".join(out)


def options(parameters: list[Parameter]) -> str:
    """Return the table of a command's arguments and options, in their groups."""
    rows = []
    for group in dict.fromkeys(["", *(p.group for p in parameters)]):
        rows += [f"| **{group}** | |"] if group else []
        rows += [row(p) for p in parameters if p.group == group]
    return "\n".join(["| option | what |", "|---|---|", *rows, ""]) if rows else ""


def row(p: Parameter) -> str:
    """Return a parameter's line."""
    return f"| `{', '.join(p.flags) or p.name.upper()}` | {p.help.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), encoding="utf-8")
