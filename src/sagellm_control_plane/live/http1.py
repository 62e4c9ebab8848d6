"""A small HTTP/1.1 client for the data path: keep-alive, chunked bodies, one wake-up for all that has arrived.

General clients cost most of a millisecond for each request; a router must not. It speaks to servers that the operator registered, so it
follows no redirects, keeps no cookies and knows no proxies.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from typing import cast
from urllib.parse import urlsplit

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Http1Client", "HttpBrokenError", "HttpRefusedError", "Reply"]

MAX_HEAD_BYTES = 64 * 1024
MAX_LINE_BYTES = 16 * 2**20


class HttpRefusedError(Exception):
    """No connection could be made: nothing was sent."""


class HttpBrokenError(Exception):
    """The connection ended, or what came was no HTTP, after something may have been sent."""


class _Connection(asyncio.Protocol):
    """Bytes in, bytes out; wakes its one reader when something arrives."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.closed = False
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of asyncio's
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def more(self) -> bool:
        """Wait for further bytes; False at the end of the connection."""
        before = len(self.buffer)
        while len(self.buffer) == before and not self.closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return len(self.buffer) > before

    def write(self, data: bytes) -> None:
        if self._transport is None or self.closed:
            raise HttpBrokenError("the connection is closed")
        self._transport.write(data)

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


class Reply:
    """Status, headers (names in lower case) and a body that is read once."""

    def __init__(self, client: Http1Client, connection: _Connection, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._client = client
        self._connection = connection
        self._complete = False

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            async for piece in self._chunks():
                yield piece
        elif "content-length" in self.headers:
            async for piece in self._counted(_number(self.headers["content-length"], 10)):
                yield piece
        else:
            async for piece in self._until_the_end():
                yield piece
        self._complete = True

    async def _counted(self, left: int) -> AsyncGenerator[bytes, None]:
        buffer = self._connection.buffer
        while left:
            if not buffer and not await self._connection.more():
                raise HttpBrokenError(f"the body ended {left} bytes early")
            piece = bytes(buffer[:left])
            del buffer[: len(piece)]
            left -= len(piece)
            yield piece

    async def _until_the_end(self) -> AsyncGenerator[bytes, None]:
        buffer = self._connection.buffer
        while buffer or await self._connection.more():
            piece = bytes(buffer)
            buffer.clear()
            yield piece
        self._connection.close()

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield what has arrived of all chunks at once: one piece for each wake-up, not one for each token."""
        buffer = self._connection.buffer
        while True:
            out, position, ended = bytearray(), 0, False
            while (end := buffer.find(b"\r\n", position)) >= 0:
                size = _number(buffer[position:end].split(b";", 1)[0].decode("latin-1"), 16)
                if len(buffer) < end + 2 + size + 2:
                    break
                if size == 0:
                    position, ended = end + 4, True
                    break
                out += buffer[end + 2 : end + 2 + size]
                position = end + 2 + size + 2
            del buffer[:position]
            # Known before the last piece is handed out: its reader may have had enough by then.
            self._complete = ended
            if out:
                yield bytes(out)
            if ended:
                return
            if len(buffer) > MAX_LINE_BYTES:
                raise HttpBrokenError(f"a chunk is longer than {MAX_LINE_BYTES} bytes")
            if not await self._connection.more():
                raise HttpBrokenError("the connection ended inside the body")

    async def read(self) -> bytes:
        """Return the whole body."""
        body = b"".join([piece async for piece in self._pieces()])
        self.close()
        return body

    async def lines(self) -> AsyncGenerator[list[bytes], None]:
        """Yield the lines that each wake-up completes, without their ends."""
        rest = b""
        async for piece in self._pieces():
            *whole, rest = (rest + piece).split(b"\n")
            if whole:
                yield whole
            if len(rest) > MAX_LINE_BYTES:
                raise HttpBrokenError(f"a line is longer than {MAX_LINE_BYTES} bytes")
        if rest:
            yield [rest]

    def close(self) -> None:
        """Let go of the connection: for the next request if the body was read to its end, else for good."""
        if self._connection.closed:
            return
        if self._complete and self.headers.get("connection", "").lower() != "close":
            self._client.give_back(self._connection)
        else:
            self._connection.close()


class Http1Client:
    """Requests to one server.

    Args:
        base_url: ``http://host:port/prefix`` or ``https://...``.
        headers: sent with each request.
        connect_s: how long a connection may take.
        keep: idle connections that are kept.

    Raises:
        InvalidArgumentError: another scheme, or no host.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str], *, connect_s: float = 5.0, keep: int = 256) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgumentError(f"{base_url!r} is no http:// or https:// URL with a host", param="base_url")
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._connect_s = connect_s
        self._keep = keep
        self._idle: list[_Connection] = []
        fixed = {"host": parts.netloc.rpartition("@")[2], "accept": "*/*", **headers}
        if any("\r" in value or "\n" in value for value in fixed.values()):
            raise InvalidArgumentError("a header's value has a line break", param="api_key")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())

    async def request(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """Send a request and return the reply once its head is there. `path` follows the base URL's.

        Raises:
            HttpRefusedError: no connection.
            HttpBrokenError: the connection ended before the head was complete.
        """
        length = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body is not None else ""
        data = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{length}\r\n".encode("latin-1") + (body or b"")
        while True:
            connection = self._take() or await self._connect()
            try:
                connection.write(data)
                status, headers = await self._read_head(connection)
            except HttpBrokenError:
                connection.close()
                # A kept connection may have been closed by the server meanwhile: that is no failure of the request.
                if connection.used and not connection.buffer:
                    continue
                raise
            except asyncio.CancelledError:
                connection.close()
                raise
            return Reply(self, connection, status, headers)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        tls = ssl.create_default_context() if self._tls else None
        try:
            _transport, connection = await asyncio.wait_for(
                loop.create_connection(_Connection, self._host, self._port, ssl=tls), self._connect_s
            )
        except (OSError, asyncio.TimeoutError) as error:
            raise HttpRefusedError(f"{type(error).__name__}") from error
        return connection

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and not connection.buffer:
                connection.used = True
                return connection
            connection.close()
        return None

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection whose reply was read to its end."""
        if len(self._idle) < self._keep and not connection.buffer:
            self._idle.append(connection)
        else:
            connection.close()

    async def _read_head(self, connection: _Connection) -> tuple[int, dict[str, str]]:
        buffer = connection.buffer
        while True:
            while (end := buffer.find(b"\r\n\r\n")) < 0:
                if len(buffer) > MAX_HEAD_BYTES:
                    raise HttpBrokenError(f"the head of the reply is longer than {MAX_HEAD_BYTES} bytes")
                if not await connection.more():
                    raise HttpBrokenError("the connection ended before a reply")
            first, *rest = bytes(buffer[:end]).decode("latin-1").split("\r\n")
            del buffer[: end + 4]
            parts = first.split(" ", 2)
            if len(parts) < 2 or not parts[0].startswith("HTTP/1."):
                raise HttpBrokenError("the reply is no HTTP/1.1")
            status = _number(parts[1], 10)
            if status != 100:
                pairs = (line.partition(":") for line in rest)
                return status, {name.strip().lower(): value.strip() for name, _colon, value in pairs}

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()


def _number(text: str, base: int) -> int:
    try:
        value = int(text.strip(), base)
    except ValueError:
        value = -1
    if value < 0:
        raise HttpBrokenError(f"{text[:20]!r} is no length")
    return value
