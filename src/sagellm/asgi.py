"""Call an ASGI application in this process, streaming: no socket, no HTTP library (ASGI 3.0, ``http`` scope)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["AsgiApp", "AsgiResponse", "open_response"]

AsgiApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]

_END = b""


class AsgiResponse:
    """A response under way: its status and headers are there, its body arrives as the application sends it."""

    def __init__(self, body: bytes) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._request_body: bytes | None = body
        self._chunks: asyncio.Queue[bytes | BaseException] = asyncio.Queue()
        self._started = asyncio.Event()
        self._gone = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def run(self, app: AsgiApp, scope: MutableMapping[str, Any]) -> None:
        """Start the application and wait until it sent the status."""
        self._task = asyncio.create_task(self._drive(app, scope))
        await self._started.wait()

    async def _drive(self, app: AsgiApp, scope: MutableMapping[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
            self._chunks.put_nowait(_END)
        except BaseException as error:
            self._chunks.put_nowait(error)
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self._started.set()

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._request_body is not None:
            body, self._request_body = self._request_body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in message.get("headers", ())}
            self._started.set()
        elif message["type"] == "http.response.body":
            if chunk := message.get("body", b""):
                self._chunks.put_nowait(chunk)
            if not message.get("more_body", False):
                self._chunks.put_nowait(_END)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the pieces of the body; raises what the application raised."""
        while True:
            chunk = await self._chunks.get()
            if isinstance(chunk, BaseException):
                raise chunk
            if chunk == _END:
                return
            yield chunk

    async def lines(self) -> AsyncGenerator[str, None]:
        """Yield the body's lines."""
        rest = b""
        async for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode()
        if rest:
            yield rest.decode()

    async def close(self) -> None:
        """Tell the application that its client is gone, and wait until it is done with that."""
        self._gone.set()
        if self._task is not None:
            await asyncio.wait([self._task])


async def open_response(app: AsgiApp, method: str, path: str, body: bytes = b"") -> AsgiResponse:
    """Send a request to `app` and return its response once the status is known; the caller closes it."""
    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("localhost", 0),
    }
    response = AsgiResponse(body)
    try:
        await response.run(app, scope)
    except BaseException:  # nobody else knows of it
        await response.close()
        raise
    return response
