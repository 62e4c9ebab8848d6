"""How the client reaches a model: over HTTP here, in the same process in `sagellm.embedded`. Lower errors are mapped to our tree at this border."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sagellm_protocol.errors import (
    DeadlineExceededError,
    Error,
    ErrorCode,
    InternalError,
    InvalidArgumentError,
    ModelNotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    SageError,
    UnauthenticatedError,
    UnavailableError,
)

if TYPE_CHECKING:
    import httpx2

_T = TypeVar("_T")

__all__ = ["HttpTransport", "Place", "RetryPolicy", "Timeouts", "Transport", "error_of_reply", "sse_chunks"]


@dataclass(frozen=True)
class Timeouts:
    """Seconds; None waits for ever.

    Attributes:
        total: of a request that is not streamed, all retries included.
        connect: to establish a connection.
        between_events: between two pieces of a stream; the server's keep-alives count.
    """

    total: float | None = 60.0
    connect: float | None = 5.0
    between_events: float | None = 60.0

    @staticmethod
    def of(value: float | Timeouts | None) -> Timeouts:
        """Return `value` itself, or timeouts with that total and that longest silence."""
        return value if isinstance(value, Timeouts) else Timeouts(total=value, between_events=value)


@dataclass(frozen=True)
class RetryPolicy:
    """When a request that has produced nothing yet is sent again.

    Only a connection that could not be made or broke, 429, 502, 503 and 504 are retried. ``Retry-After`` is obeyed up to
    `longest_s`; without it the pause is drawn from [0, min(longest_s, first_s · 2^k)] (full jitter).
    """

    attempts: int = 3
    first_s: float = 0.25
    longest_s: float = 30.0

    def pause(self, attempt: int, retry_after_s: float | None) -> float:
        """Return the seconds to wait before attempt number `attempt` (the first retry is 1)."""
        if retry_after_s is not None:
            return min(retry_after_s, self.longest_s)
        return random.uniform(0.0, min(self.longest_s, self.first_s * 2.0**attempt))  # noqa: S311 - jitter, not a secret


@dataclass
class Place:
    """Where a stream stands, in the server's own words; empty where the server gives its events no ids."""

    event_id: str = ""

    def headers(self, body: Mapping[str, Any]) -> dict[str, str]:
        """Return what asks a server of ours for ids, or to go on from here."""
        if self.event_id:
            return {"last-event-id": self.event_id}
        # An entry of logprobs cannot be cut in two: with them a stream is not resumed.
        return {} if body.get("logprobs") else {"x-stream-resume": "true"}


class Transport(Protocol):
    """JSON in, JSON out; paths are those under ``/v1``, or absolute with ``//`` for the ones beside it."""

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON at `path`.

        Raises:
            SageError: what the server said, or that it cannot be reached.
        """
        ...

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` and return the reply.

        Raises:
            SageError: what the server said, or that it cannot be reached.
        """
        ...

    def events(
        self, path: str, body: dict[str, Any], place: Place | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send `body` and yield the chunks of the reply; closing the generator aborts the request.

        With a `place`, from there on, and it follows what is yielded.

        Raises:
            SageError: what the server said, before or in the middle of the stream.
        """
        ...

    async def start_model(self, model_id: str, longest_s: float) -> None:
        """Start an engine for `model_id` and wait until it serves.

        Raises:
            ModelNotFoundError: there is no such model.
            DeadlineExceededError: it takes longer than `longest_s` seconds.
        """
        ...

    async def close(self) -> None:
        """Let go of connections, or of the engine. Idempotent."""
        ...


_RETRIED = (UnavailableError, ResourceExhaustedError)


class HttpTransport:
    """An OpenAI-compatible server at `base_url` (which ends in ``/v1``)."""

    def __init__(self, base_url: str, *, api_key: str | None, timeouts: Timeouts, retries: RetryPolicy) -> None:
        import httpx2

        headers = {"user-agent": "isagellm"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self.base_url = base_url.rstrip("/")
        self._timeouts = timeouts
        self._retries = retries
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(timeouts.between_events, connect=timeouts.connect),
            limits=httpx2.Limits(max_connections=256, max_keepalive_connections=64),
        )

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON at `path`."""
        return await self._call("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` and return the reply."""
        return await self._call("POST", path, body)

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request of any method and return the reply."""
        return await self._call(method, path, body)

    async def start_model(self, model_id: str, longest_s: float) -> None:
        """Ask the control plane to start an engine for `model_id`; it answers when the engine serves."""
        await self._call("POST", "/management/engines", {"model_id": model_id}, longest_s)

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None, longest: float | None = None
    ) -> dict[str, Any]:
        longest = longest if longest is not None else self._timeouts.total
        try:
            return await asyncio.wait_for(self._retrying(lambda: self._once(method, path, body, longest)), longest)
        except asyncio.TimeoutError as error:
            raise DeadlineExceededError(
                f"no reply from {self.base_url} within {longest} s: pass a larger timeout or a smaller max_tokens"
            ) from error

    async def _retrying(self, call: Callable[[], Awaitable[_T]]) -> _T:
        for attempt in range(1, self._retries.attempts):
            try:
                return await call()
            except _RETRIED as error:  # noqa: PERF203 - a retry is the rare case
                await asyncio.sleep(self._retries.pause(attempt, error.retry_after_s))
        return await call()

    async def _once(self, method: str, path: str, body: dict[str, Any] | None, longest: float | None) -> dict[str, Any]:
        import httpx2

        # A reply that is not streamed is silent until it is whole: only the total bounds it.
        patience = httpx2.Timeout(longest, connect=self._timeouts.connect)
        async with self._mapped():
            response = await self._http.request(method, self._url(path), json=body, timeout=patience)
        if response.is_error:
            raise error_of_reply(response.status_code, response.content, response.headers.get("retry-after", ""))
        try:
            reply = response.json()
        except ValueError as error:
            raise InternalError(
                f"{self.base_url} answered {path} with something that is not JSON: is it an OpenAI-compatible server?"
            ) from error
        return reply if isinstance(reply, dict) else {"data": reply}

    async def events(
        self, path: str, body: dict[str, Any], place: Place | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send `body` and yield the chunks of the reply."""
        headers = place.headers(body) if place is not None else {}
        response = await self._retrying(lambda: self._open(path, body, headers))
        try:
            async with self._mapped(), contextlib.aclosing(sse_chunks(response.aiter_lines(), place)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            await response.aclose()

    async def _open(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> httpx2.Response:
        async with self._mapped():
            request = self._http.build_request("POST", self._url(path), json=body, headers=headers)
            response = await self._http.send(request, stream=True)
            if response.is_error:
                await response.aread()
        if response.is_error:
            raise error_of_reply(response.status_code, response.content, response.headers.get("retry-after", ""))
        return response

    def _url(self, path: str) -> str:
        if path.startswith("//"):
            return self.base_url.removesuffix("/v1") + path[1:]
        return self.base_url + path

    def _mapped(self) -> _HttpErrors:
        return _HttpErrors(self.base_url)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()


class _HttpErrors:
    """Maps the HTTP library's exceptions to our tree."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        import httpx2

        if isinstance(error, httpx2.TimeoutException) and not isinstance(
            error, httpx2.ConnectTimeout | httpx2.PoolTimeout
        ):
            raise DeadlineExceededError(
                f"{self._base_url} was silent for longer than the timeout: pass a larger timeout"
            ) from error
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            raise UnavailableError(
                f"nothing answers at {self._base_url}: start a server with `sage-llm serve`, or give another URL"
            ) from error
        if isinstance(error, httpx2.TransportError):
            raise UnavailableError(
                f"the connection to {self._base_url} broke ({type(error).__name__}): try again"
            ) from error
        if isinstance(error, httpx2.InvalidURL):
            raise InvalidArgumentError(
                f"{self._base_url!r} is not a URL: give one such as http://127.0.0.1:8889/v1"
            ) from error


async def sse_chunks(lines: AsyncIterator[str], place: Place | None = None) -> AsyncGenerator[dict[str, Any], None]:
    """Decode server-sent events (WHATWG HTML, section 9.2) with JSON data, up to ``[DONE]``; `place` follows their ids.

    Several events may belong to one id, which the last of them carries. They are given out together: what comes before an id
    that never arrived would come again.
    """
    place = place or Place()
    event_id, held, done = "", list[dict[str, Any]](), False
    async for line in lines:
        if line.startswith("id:"):
            event_id = line[3:].strip()
        if not line.startswith("data:"):
            continue  # comments keep the connection alive; event names repeat what the data says
        data = line[5:].strip()
        if data == "[DONE]":
            done = True
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise _error_of_body(chunk["error"], 500)
        held.append(chunk)
        if event_id or not place.event_id:
            place.event_id, event_id = event_id, ""
            for each in held:
                yield each
            held.clear()
    if not done:
        raise UnavailableError("the stream ended before it was complete: the server went away; try again")
    for each in held:
        yield each


_BY_STATUS: dict[int, type[SageError]] = {
    400: InvalidArgumentError,
    401: UnauthenticatedError,
    403: PermissionDeniedError,
    404: ModelNotFoundError,
    408: DeadlineExceededError,
    413: InvalidArgumentError,
    415: InvalidArgumentError,
    422: InvalidArgumentError,
    429: ResourceExhaustedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineExceededError,
}


def error_of_reply(status: int, body: bytes, retry_after: str = "") -> SageError:
    """Return the exception that a reply with an error status describes; `retry_after` is its header."""
    try:
        error = json.loads(body).get("error")
    except (ValueError, AttributeError):
        error = None
    seconds = float(retry_after) if retry_after.replace(".", "", 1).isdigit() else None
    return _error_of_body(error, status, seconds)


def _error_of_body(body: Any, status: int, retry_after_s: float | None = None) -> SageError:
    if not isinstance(body, dict):
        body = {"message": str(body) if body else f"the server answered {status} without a reason"}
    message = str(body.get("message") or f"the server answered {status}")
    param = body.get("param")
    try:
        code = ErrorCode(body.get("code"))
    except ValueError:
        cls = _BY_STATUS.get(status, InternalError if status >= 500 else InvalidArgumentError)
        return cls(message, param=param, retry_after_s=retry_after_s)
    return SageError.from_wire(Error(code=code, message=message, param=param, retry_after_s=retry_after_s))
