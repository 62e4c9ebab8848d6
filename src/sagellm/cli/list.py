"""``sage-llm list``."""

from __future__ import annotations

import time
from typing import Annotated

from sagellm import store
from sagellm.cli.common import JsonOption, human_bytes, print_json, print_table, single


def list_models(as_json: Annotated[bool, JsonOption] = False) -> None:
    """Show the models on this machine."""
    models = store.installed()
    if as_json:
        print_json([{"name": m.name, "path": str(m.path), "size_bytes": m.size_bytes, **m.manifest} for m in models])
        return
    if not models:
        print(f"no models yet: sage-llm pull {store.DEFAULT_MODEL}")
        return
    rows = [
        (m.name, human_bytes(m.size_bytes), m.kind, m.manifest.get("license") or "-", _day(m.manifest.get("pulled_at")))
        for m in models
    ]
    print_table(("NAME", "SIZE", "KIND", "LICENCE", "PULLED"), rows)


def _day(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds)) if seconds else "-"


app = single(list_models)
