"""The client's way to an engine in its own process: the gateway's application is called directly, so that replies are the server's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

from sagellm import compose
from sagellm.asgi import AsgiApp, AsgiResponse, open_response
from sagellm.transport import Place, Timeouts, error_of_reply, sse_chunks
from sagellm_protocol.errors import DeadlineExceededError, InternalError

__all__ = ["EmbeddedTransport"]

_T = TypeVar("_T")


class EmbeddedTransport:
    """An engine, a control plane and the gateway's application in this process; no port is opened."""

    def __init__(self, house: compose.House, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self.model = house.models[0]
        self.embedding_model = house.models[1] if len(house.models) > 1 else None
        self.house = house
        self._app: AsgiApp = house.app()

    @classmethod
    async def start(
        cls,
        model: str | None,
        embedding_model: str | None = None,
        engine: Mapping[str, Any] | None = None,
        timeouts: Timeouts | None = None,
    ) -> EmbeddedTransport:
        """Load `model` (default: the store's default model) and return a transport to it; without `timeouts` it waits for ever.

        Raises:
            SageError: the model is missing, damaged, or does not fit.
        """
        return cls(await compose.start_embedded(model, embedding_model, engine or {}), timeouts or Timeouts.of(None))

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON at `path`."""
        return await self._call("GET", path, b"")

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` and return the reply."""
        return await self._call("POST", path, json.dumps(body).encode())

    async def events(
        self, path: str, body: dict[str, Any], place: Place | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send `body` and yield the chunks of the reply; no connection breaks here, so `place` stays where it is."""
        response = await open_response(self._app, "POST", _full(path), json.dumps(body).encode())
        try:
            if response.status >= 400:
                raise _error(response, await _body(response))
            chunks = sse_chunks(response.lines(), place)
            while (chunk := await self._within(anext(chunks, None), self._timeouts.between_events)) is not None:
                yield chunk
        finally:
            await response.close()

    async def _within(self, waiting: Awaitable[_T], seconds: float | None) -> _T:
        try:
            return await asyncio.wait_for(waiting, seconds)
        except asyncio.TimeoutError as error:
            raise DeadlineExceededError(
                f"the engine took longer than {seconds} s: pass a larger timeout or a smaller max_tokens"
            ) from error

    async def _call(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        return await self._within(self._reply(method, path, body), self._timeouts.total)

    async def _reply(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        response = await open_response(self._app, method, _full(path), body)
        try:
            reply = await _body(response)
        finally:
            await response.close()
        if response.status >= 400:
            raise _error(response, reply)
        value = json.loads(reply)
        return value if isinstance(value, dict) else {"data": value}

    async def start_model(self, model_id: str, longest_s: float) -> None:
        """Load `model_id` into this process, beside what is loaded already."""
        try:
            await asyncio.wait_for(compose.add_local(self.house.manager, compose.engine_config(model_id)), longest_s)
        except asyncio.TimeoutError as error:
            raise DeadlineExceededError(
                f"{model_id} was not loaded within {longest_s} s: pass a longer time"
            ) from error

    async def close(self) -> None:
        """End the engine."""
        await self.house.close()


def _full(path: str) -> str:
    return path[1:] if path.startswith("//") else f"/v1{path}"


async def _body(response: AsgiResponse) -> bytes:
    return b"".join([chunk async for chunk in response.chunks()])


def _error(response: AsgiResponse, body: bytes) -> Exception:
    if not response.status:
        return InternalError("the application answered nothing")
    return error_of_reply(response.status, body, response.headers.get("retry-after", ""))
