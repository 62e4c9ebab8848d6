"""``sage-llm stop``: unload a model of a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm.cli.admin import ApiKey, Url, call
from sagellm.cli.common import single


def stop(
    model: Annotated[str, typer.Argument(help="The model, as `sage-llm ps` shows it.")],
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Drain and stop the engines of a model; running answers finish first."""
    stopped = call("POST", "/management/models/unload", {"model": model}, url=url, api_key=api_key)["stopped"]
    print(f"stopped: {', '.join(stopped)}")


app = single(stop)
