"""``sage-llm pull``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sagellm.cli.common import JsonOption, ProgressBar, human_bytes, print_json, print_table, single
from sagellm.store.catalog import CATALOG


def pull(
    model: Annotated[
        str,
        typer.Argument(
            help="A name of the catalogue (see --catalog), a path, https://…, hf:org/repo[:QUANT] or ms:org/repo/file."
        ),
    ] = "",
    name: Annotated[str | None, typer.Option(help="What to call it here; the default follows from MODEL.")] = None,
    sha256: Annotated[str | None, typer.Option(help="What the weight file must hash to.")] = None,
    catalog: Annotated[
        bool, typer.Option("--catalog", help="List the models that are known by name, and stop.")
    ] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Bring a model onto this machine; an interrupted pull goes on where it stopped."""
    if catalog and as_json:
        print_json([asdict(entry) for entry in CATALOG.values()])
        return
    if catalog:
        print_table(
            ("NAME", "SIZE", "LICENCE", ""),
            [(e.name, f"{e.size_mb} MB", e.license, e.summary) for e in CATALOG.values()],
        )
        return
    if not model:
        raise typer.BadParameter("name a model: " + ", ".join(CATALOG), param_hint="MODEL")
    from sagellm.store.pull import pull as fetch

    bar = ProgressBar()
    try:
        stored = fetch(model, name=name, sha256=sha256, progress=bar)
    finally:
        bar.finish()
    if as_json:
        print_json({"name": stored.name, "path": str(stored.path), "bytes": stored.size_bytes})
        return
    print(f"{stored.name} is ready: {human_bytes(stored.size_bytes)} in {stored.path}")
    for notice in CATALOG[stored.name].notices if stored.name in CATALOG else ():
        print(notice)


app = single(pull)
