"""``sage-llm``: find the command, load only its module, turn errors into one line with the cure.

A command module offers either ``app`` (a `typer.Typer`) or ``main(argv) -> int``. The table below is all that ``--help`` needs,
which is why it answers without importing anything else.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from sagellm._version import __version__
from sagellm.mixed_wheels import cure, old_distributions

__all__ = ["ALIASES", "COMMANDS", "Command", "main"]

PROGRAM = "sage-llm"


class Command(NamedTuple):
    """Where a command lives and what it does, in one line; `parser` makes the argument parser of one that is no typer application."""

    module: str
    help: str
    group: str
    entry: str = "app"
    parser: str = ""


_TALK, _MODELS, _OPERATE = "Talk", "Models", "Operate"

COMMANDS: dict[str, Command] = {
    "run": Command("sagellm.cli.run", "Chat with a model in the terminal, or answer one prompt", _TALK),
    "chat": Command("sagellm.cli.chat", "Chat with a running server", _TALK),
    "serve": Command("sagellm.cli.serve", "Serve models over HTTP: OpenAI-compatible, on 127.0.0.1:8889", _TALK),
    "gateway": Command("sagellm.cli.gateway", "Serve without a model; engines join over /v1/management", _TALK),
    "pull": Command("sagellm.cli.pull", "Bring a model onto this machine", _MODELS),
    "list": Command("sagellm.cli.list", "Show the models on this machine", _MODELS),
    "show": Command("sagellm.cli.show", "Show what a model is", _MODELS),
    "cp": Command("sagellm.cli.cp", "Give a model a second name", _MODELS),
    "rm": Command("sagellm.cli.rm", "Delete a model from this machine", _MODELS),
    "ps": Command("sagellm.cli.ps", "Show the engines of a running server", _OPERATE),
    "stop": Command("sagellm.cli.stop", "Unload a model of a running server", _OPERATE),
    "engine": Command("sagellm.cli.engine", "Start, stop and drain engines of a running server", _OPERATE),
    "top": Command("sagellm.cli.top", "Watch a running server: engines, queue, KV, rates", _OPERATE),
    "keys": Command("sagellm.cli.keys", "API keys: add, list, revoke", _OPERATE),
    "bench": Command("sagellm.cli.bench", "Measure a server, an engine or its quality, compare two runs", _OPERATE),
    "demo": Command("sagellm.cli.demo", "Measure this machine by a year's workload and judge the numbers", _OPERATE),
    "simulate": Command(
        "sagellm_control_plane.sim.command", "Run a trace through the policies, simulated", _OPERATE, "main", "parser"
    ),
    "profile": Command("sagellm.cli.profile", "Measure an engine for the simulator", _OPERATE),
    "info": Command("sagellm.cli.info", "Show this installation and machine", _OPERATE),
    "doctor": Command(
        "sagellm.cli.doctor", "Check the installation and the machine, with the cure of what is wrong", _OPERATE
    ),
    "plan": Command("sagellm.cli.plan", "Show what a model would need in memory against what is free", _OPERATE),
    "logs": Command("sagellm.cli.logs", "Show what engine processes wrote", _OPERATE),
    "protocol": Command("sagellm.cli.protocol", "Write the JSON Schema of all types: protocol schema", _OPERATE),
    "config": Command("sagellm.cli.config", "Show settings and where they come from", _OPERATE),
    "migrate": Command(
        "sagellm.migrate.cli",
        "Rewrite a code base from the old names to the new",
        _OPERATE,
        "migrate",
        "migrate_parser",
    ),
    "arch": Command(
        "sagellm.migrate.cli", "Check a code base against the architecture's rules", _OPERATE, "arch", "arch_parser"
    ),
    "launch": Command("sagellm.cli.launch", "Set llm, aider, codex, opencode or openwebui up for our server", _OPERATE),
    "explain": Command("sagellm.cli.explain", "Say what an error means and what cures it", _OPERATE),
    "completion": Command("sagellm.cli.completion", "Print the completion script of bash, zsh or fish", _OPERATE),
    "version": Command("sagellm.cli.version", "Print the version", _OPERATE),
}

ALIASES = {"ls": "list", "check": "doctor"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = _take_flag(args, "--debug") or bool(os.environ.get("SAGELLM_DEBUG"))
    if not args or args[0] in {"-h", "--help", "help"}:
        sys.stdout.write(_help())
        return 0
    if args[0] in {"-V", "--version"}:
        args[0] = "version"
    name = ALIASES.get(args[0], args[0])
    command = COMMANDS.get(name)
    if command is None:
        sys.stderr.write(f"error: no command {args[0]!r}{_suggestion(args[0])}: {PROGRAM} --help lists them\n")
        return 2
    old = old_distributions()
    if old:  # imports may reach their modules: nothing can be trusted to run
        sys.stderr.write(
            f"error: releases before {__version__} are mixed into this installation: {', '.join(old)}. This cures it:\n"
            f"  {cure(old)}\n"
        )
        return 1
    return _run(name, command, args[1:], debug=debug)


def _run(name: str, command: Command, args: list[str], *, debug: bool) -> int:
    from sagellm.cli import failures

    try:
        return _call(name, command, args)
    except SystemExit as leaving:
        return failures.exit_status(leaving.code)
    except KeyboardInterrupt:
        return failures.INTERRUPTED
    except BrokenPipeError:
        return failures.reader_went_away()
    except Exception as error:
        if debug:
            raise
        return failures.report(error)


def _call(name: str, command: Command, args: list[str]) -> int:
    entry = getattr(importlib.import_module(command.module), command.entry)
    if command.entry != "app":
        return int(entry(args))
    entry(args, prog_name=f"{PROGRAM} {name}")
    return 0


def _take_flag(args: list[str], flag: str) -> bool:
    end = args.index("--") if "--" in args else len(args)
    if flag in args[:end]:
        args.remove(flag)
        return True
    return False


def _suggestion(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, [*COMMANDS, *ALIASES], n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"Usage: {PROGRAM} COMMAND [ARGUMENTS]", "", "LLM inference on your own machine.", ""]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines.append(f"{group}:")
        lines += [f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items() if c.group == group]
        lines.append("")
    lines += [
        f"{PROGRAM} COMMAND --help describes one command. --debug (or SAGELLM_DEBUG=1) shows tracebacks.",
        "",
        "Start here:",
        f'  {PROGRAM} run smollm2:135m "What is the capital of France?"',
        f"  {PROGRAM} serve smollm2:135m",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
