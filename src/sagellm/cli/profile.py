"""``sage-llm profile``: measure an engine and write the simulator's constants."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from sagellm.cli.common import single


def profile(
    model: Annotated[str, typer.Argument(help="Name or path of a model, or mock.")] = "smollm2:135m",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON there instead.")] = None,
) -> None:
    """Measure prefill and decode of an engine here; `sage-llm simulate --constants FILE` takes the result."""
    text = msgspec.json.format(msgspec.json.encode(asyncio.run(_measure(model)))).decode()
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


async def _measure(model: str) -> object:
    from sagellm import compose
    from sagellm_control_plane.sim.profile import profile_engine

    house = await compose.start_embedded(model)
    try:
        return await profile_engine(house.manager.engine_client(house.manager.list_engines()[0].engine_id))
    finally:
        await house.close()


app = single(profile)
