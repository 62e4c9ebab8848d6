"""``sage-llm protocol``: the types that programs exchange with isagellm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sagellm.cli.common import new_app, print_json

app = new_app()


@app.callback()
def protocol() -> None:
    """Show the protocol."""


@app.command()
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; the terminal if left out.")
    ] = None,
) -> None:
    """Write the JSON Schema (draft 2020-12) of every type."""
    import json

    from sagellm_protocol.schema import json_schema

    described = json_schema()
    if output is None:
        print_json(described)
        return
    output.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    print(f"{output}: {len(described['oneOf'])} types")
