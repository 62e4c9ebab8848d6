"""``sage-llm cp``."""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm import store
from sagellm.cli.common import single


def cp(
    source: Annotated[str, typer.Argument(help="A model of the store.")],
    destination: Annotated[str, typer.Argument(help="Its second name.")],
) -> None:
    """Give a model a second name; the content is shared."""
    print(f"{store.copy(source, destination).name} is {source} too")


app = single(cp)
