"""``sage-llm ps``: the engines of a running server."""

from __future__ import annotations

import time
from typing import Annotated, Any

from sagellm.cli.admin import ApiKey, Url, call
from sagellm.cli.common import JsonOption, print_json, print_table, single


def ps(url: Url = None, api_key: ApiKey = None, as_json: Annotated[bool, JsonOption] = False) -> None:
    """Show the engines of a running server."""
    engines = call("GET", "/management/engines", url=url, api_key=api_key)["engines"]
    if as_json:
        print_json(engines)
    elif not engines:
        print("no engines: sage-llm engine start MODEL")
    else:
        print_table(
            ("ENGINE", "MODEL", "STATE", "PID", "RUNNING", "DONE", "FAILED", "RESTARTS", "UP"),
            [row(e) for e in engines],
        )


def row(engine: dict[str, Any]) -> tuple[str, ...]:
    """Return an engine's cells."""
    up = max(0, int(time.time() - engine["created_at"]))
    cells = (engine["engine_id"], engine["model_id"], engine["state"], engine["pid"] or "-", engine["active_requests"])
    return tuple(map(str, (*cells, engine["total_requests"], engine["failed_requests"], engine["restarts"], f"{up} s")))


app = single(ps)
