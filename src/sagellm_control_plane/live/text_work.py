"""Templates and tokenizers beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sagellm_protocol.generation import GenerationRequest

__all__ = ["LONG", "characters", "off_loop"]

LONG = 8192
"""Characters: some 2,000 tokens, which take about 4 ms. Below, a thread costs others more than it spares them."""

T = TypeVar("T")


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Do `work` on a text of `size` characters: a long one on a thread, so that the event loop serves others meanwhile."""
    return await asyncio.to_thread(work) if size > LONG else work()


def characters(request: GenerationRequest) -> int:
    """How much text there is to tokenise."""
    messages = sum([len(message.content or "") for message in request.messages or ()])
    return messages + (len(request.prompt) if isinstance(request.prompt, str) else 0)
