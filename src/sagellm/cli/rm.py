"""``sage-llm rm``."""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm import store
from sagellm.cli.common import human_bytes, single


def rm(model: Annotated[str, typer.Argument(help="The model's name, as `sage-llm list` shows it.")]) -> None:
    """Delete a model from this machine."""
    freed = store.remove(model)
    print(f"{model} is gone: {human_bytes(freed)} freed")


app = single(rm)
