"""``sage-llm logs``: what engine processes wrote, also those that have ended."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from sagellm.cli.common import JsonOption, human_bytes, print_json, print_table, single
from sagellm_protocol.errors import InvalidArgumentError

_FOLLOW_S = 0.3


def logs(
    engine: Annotated[
        str | None, typer.Argument(help="Engine id; without it the engines that have logs are listed.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Show what an engine process wrote."""
    from sagellm_control_plane.live.engine_log import EngineLog, log_path
    from sagellm_control_plane.live.process_driver import ProcessOptions

    if follow and (as_json or engine is None):
        raise InvalidArgumentError("--follow prints the lines of one engine: name it, and drop --json", param="follow")
    options = ProcessOptions.default()
    if engine is None:
        _list(options.log_dir, as_json=as_json)
        return
    path = log_path(options.log_dir, engine)
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in options.log_dir.glob("*.log"))) or "none"
        raise InvalidArgumentError(f"engine {engine!r} has no log here: {known} have", param="engine")
    said = EngineLog(path, options.log_bytes).tail(lines)
    if as_json:
        print_json(said)
        return
    sys.stdout.writelines(f"{line}\n" for line in said)
    if follow:
        _follow(path)


def _list(directory: Path, *, as_json: bool) -> None:
    files = sorted(directory.glob("*.log"), key=lambda file: file.stat().st_mtime, reverse=True)
    if as_json:
        print_json(
            [{"engine": f.stem, "path": str(f), "bytes": f.stat().st_size, "at": f.stat().st_mtime} for f in files]
        )
    elif not files:
        print(f"no engine has written to {directory} yet: engines of `sage-llm serve` do")
    else:
        rows = [
            (f.stem, human_bytes(f.stat().st_size), time.strftime("%Y-%m-%d %H:%M", time.localtime(f.stat().st_mtime)))
            for f in files
        ]
        print_table(("ENGINE", "SIZE", "LAST WRITTEN"), rows)


def _follow(path: Path) -> None:
    """Print what is appended, until Ctrl-C; a log that was cut is read from its beginning."""
    position = path.stat().st_size
    while True:
        sys.stdout.flush()
        time.sleep(_FOLLOW_S)
        size = path.stat().st_size
        if size < position:
            position = 0
        if size > position:
            with path.open("rb") as file:
                file.seek(position)
                sys.stdout.write(file.read().decode(errors="replace"))
                position = file.tell()


app = single(logs)
