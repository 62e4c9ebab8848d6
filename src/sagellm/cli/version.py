"""``sage-llm version``."""

from __future__ import annotations

import typer

from sagellm._version import __version__

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def version() -> None:
    """Print the version."""
    print(f"isagellm {__version__}")
