"""An application called without a socket: who goes away is missed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sagellm.asgi import open_response


def test_giving_up_before_the_status_ends_the_request() -> None:
    """Who is cancelled while a response is being opened is a client that went away: the application is told, and has ended."""
    seen: list[str] = []
    began = asyncio.Event()

    async def app(
        _scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        _send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        for _ in range(2):
            seen.append((await receive())["type"])
            began.set()

    async def give_up() -> None:
        opening = asyncio.create_task(open_response(app, "GET", "/"))
        await began.wait()
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(give_up())
    assert seen == ["http.request", "http.disconnect"]
