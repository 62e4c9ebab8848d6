"""``sage-llm config``: show, path, reset."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sagellm import settings
from sagellm.cli.common import JsonOption, new_app, print_json, print_table

app = new_app()


@app.callback()
def config() -> None:
    """Settings of `sage-llm serve`: defaults, the file, environment variables; flags come last."""


@app.command()
def show(
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Print every setting as `serve` would see it without flags."""
    values = settings.resolve()
    if as_json:
        print_json({n: {"value": v.value, "origin": v.origin, "where": v.where} for n, v in values.items()})
        return
    if not origin:
        print_table(
            ("SETTING", "VALUE", ""), [(n, _shown(v.value), settings.SETTINGS[n].help) for n, v in values.items()]
        )
        return
    rows = [(n, _shown(v.value), v.origin, v.where or settings.SETTINGS[n].variable) for n, v in values.items()]
    print_table(("SETTING", "VALUE", "ORIGIN", "WHERE (OR THE VARIABLE THAT SETS IT)"), rows)


@app.command()
def path() -> None:
    """Print where the configuration file is, or would be."""
    print(settings.config_path())


@app.command()
def reset(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Move the configuration file aside, so that the defaults apply."""
    file = settings.config_path()
    if not file.is_file():
        print(f"{file} is not there: the defaults apply already")
        return
    backup = file.with_name(f"{file.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
    if not yes:
        typer.confirm(f"Move {file} to {backup.name}?", abort=True)
    file.rename(backup)
    print(f"the defaults apply; the old settings are in {backup}")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
