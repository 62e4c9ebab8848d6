"""A small HTTP/1.1 client for the data path: kept connections, and bytes pushed to their receiver as they arrive.

General clients cost most of a millisecond for each request; a router must not. Nothing here waits for anything: a request on a kept
connection is one write, and each arrival is parsed and handed on at once, without a task or a queue. It speaks to servers that the operator
registered, so it follows no redirects, keeps no cookies and knows no proxies.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

from sagellm_control_plane.live.http1_body import BodyReader, HttpBrokenError, body_framing
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Exchange", "Http1Client", "HttpBrokenError", "HttpRefusedError", "Receiver", "Reply"]

MAX_HEAD_BYTES = 64 * 1024
#: A server that has said all of an answer may take this long to end it, in seconds; then its connection is closed.
LINGER_S = 5.0

_STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: |\r|$)")


class HttpRefusedError(Exception):
    """No connection could be made: nothing was sent."""


class Receiver(Protocol):
    """What becomes of a request: `head`, any number of `body`, and `end`; or `failed` instead, at any point, once.

    An exception from `head`, `body` or `end` is a bug: it ends the connection.
    """

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """The reply has begun; names of headers are in lower case."""
        ...

    def body(self, data: bytes) -> None:
        """All that has arrived of the body since the last call."""
        ...

    def end(self) -> None:
        """The reply is complete."""
        ...

    def failed(self, error: HttpRefusedError | HttpBrokenError) -> None:
        """There was no connection, or it ended early."""
        ...


class Reply:
    """A whole reply."""

    def __init__(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.status = status
        self.headers = headers
        self.content = content


class _Connection(asyncio.Protocol):
    """One connection; at most one exchange at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.exchange: Exchange | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of asyncio's
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.received(data)
        else:
            self.close()  # nobody asked

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.closed = True
        if self.exchange is not None:
            self.exchange.lost()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


class Exchange:
    """One request and its reply. Made by `Http1Client.start`."""

    __slots__ = (
        "_body", "_client", "_connecting", "_connection", "_data", "_linger", "_receiver", "_rest", "_reusable", "_used",
    )  # fmt: skip

    def __init__(self, client: Http1Client, data: bytes, receiver: Receiver) -> None:
        self._client = client
        self._data = data
        self._receiver: Receiver | None = receiver
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._body: BodyReader | None = None
        self._rest = b""
        self._reusable = True
        self._used = False
        self._linger: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Send the request, over a kept connection if there is one."""
        connection = self._client.take()
        if connection is not None:
            self._used = True
            self._send(connection)
        else:
            self._used = False
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            connection = await self._client.connect()
        except HttpRefusedError as error:
            self._fail(error)
            return
        finally:
            self._connecting = None
        if self._receiver is None:
            connection.close()  # cancelled at the same moment
        else:
            self._send(connection)

    def _send(self, connection: _Connection) -> None:
        self._connection = connection
        connection.exchange = self
        connection.write(self._data)

    def cancel(self) -> None:
        """Have no more of it: the connection is closed, at which servers abort. Idempotent."""
        self._receiver = None
        if self._connecting is not None:
            self._connecting.cancel()
        self._drop()

    def finish(self) -> None:
        """Nothing more is wanted, and nothing is wrong: the reply is read to its end, so that the connection can be kept."""
        self._receiver = None

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._stay(linger=False)
        if connection is not None:
            connection.exchange = None
            connection.close()

    def _fail(self, error: HttpRefusedError | HttpBrokenError) -> None:
        receiver, self._receiver = self._receiver, None
        self._drop()
        if receiver is not None:
            receiver.failed(error)

    def received(self, data: bytes) -> None:
        """Bytes of the reply have arrived."""
        try:
            if self._body is None:
                self._take_head(data)
            else:
                self._take_body(self._body, data)
        except HttpBrokenError as error:
            self._fail(error)

    def _take_head(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise HttpBrokenError(f"the head of the reply is longer than {MAX_HEAD_BYTES} bytes")
                self._rest = data
                return
            head = self._client.head_of(data[:end])
            data = data[end + 4 :]
            if head.status != 100:
                break
        self._rest = b""
        self._reusable = head.keeps
        body = self._body = head.body()
        if self._receiver is not None:
            self._receiver.head(head.status, head.headers)
        self._take_body(body, data)

    def _take_body(self, body: BodyReader, data: bytes) -> None:
        piece = body.take(data)
        if piece and self._receiver is not None:
            self._receiver.body(piece)
        if body.complete:
            self._complete(body.clean)
        elif self._receiver is None:
            self._stay(linger=True)

    def _stay(self, *, linger: bool) -> None:
        if linger and self._linger is None and self._connection is not None:
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self._drop)
        elif not linger and self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def _complete(self, clean: bool) -> None:
        """The reply was read to its end: its connection may serve the next request."""
        connection, self._connection = self._connection, None
        self._stay(linger=False)
        if connection is not None:
            connection.exchange = None
            if clean and self._reusable:
                self._client.give_back(connection)
            else:
                connection.close()
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.end()

    def lost(self) -> None:
        """The connection ended."""
        self._connection = None
        self._stay(linger=False)
        if self._receiver is None:
            return
        if self._body is not None and self._body.until_close:
            self._complete(clean=False)
        elif self._used and self._body is None and not self._rest:
            self.begin()  # the server had closed a kept connection meanwhile: that is no failure of the request
        else:
            where = "inside the body" if self._body is not None else "before a reply"
            self._fail(HttpBrokenError(f"the connection ended {where}"))


class _Head:
    """The head of a reply, read."""

    __slots__ = ("body", "headers", "keeps", "raw", "status")

    def __init__(self, raw: bytes) -> None:
        first = _STATUS.match(raw)
        if first is None:
            raise HttpBrokenError("the reply is no HTTP/1.1")
        self.raw = raw
        self.status = int(first[2])
        self.headers: dict[str, str] = {}
        for line in raw.decode("latin-1").split("\r\n")[1:]:
            name, _colon, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        default = "keep-alive" if first[1] == b"1" else "close"
        self.keeps = self.headers.get("connection", default).lower() != "close"
        self.body = body_framing(self.status, self.headers)


class Http1Client:
    """Requests to one server.

    Args:
        base_url: ``http://host:port/prefix`` or ``https://...``.
        headers: sent with each request.
        connect_s: how long a connection may take.
        keep: idle connections that are kept.

    Raises:
        InvalidArgumentError: another scheme, no host, or a header with a line break.
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
        self._last_head: _Head | None = None
        fixed = {"host": parts.netloc.rpartition("@")[2], "accept": "*/*", **headers}
        if any("\r" in value or "\n" in value for value in fixed.values()):
            raise InvalidArgumentError("a header's value has a line break", param="api_key")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())

    def start(self, method: str, path: str, body: bytes | None, receiver: Receiver) -> Exchange:
        """Send a request; `receiver` is told the reply, never before this returns. `path` follows the base URL's."""
        length = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body is not None else ""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{length}\r\n".encode("latin-1")
        exchange = Exchange(self, head + body if body else head, receiver)
        exchange.begin()
        return exchange

    async def request(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """Send a request and return the whole reply; cancelling the task closes the connection.

        Raises:
            HttpRefusedError: no connection.
            HttpBrokenError: the connection ended before the reply was complete.
        """
        whole = _Whole()
        exchange = self.start(method, path, body, whole)
        try:
            return await whole.reply
        finally:
            if not whole.reply.done() or whole.reply.cancelled():
                exchange.cancel()

    async def connect(self) -> _Connection:
        """Open a connection.

        Raises:
            HttpRefusedError: it cannot be had.
        """
        loop = asyncio.get_running_loop()
        tls = ssl.create_default_context() if self._tls else None
        try:
            _transport, connection = await asyncio.wait_for(
                loop.create_connection(_Connection, self._host, self._port, ssl=tls), self._connect_s
            )
        except (OSError, asyncio.TimeoutError) as error:
            raise HttpRefusedError(f"{type(error).__name__}") from error
        return connection

    def head_of(self, raw: bytes) -> _Head:
        """Read a reply's head, without its last line end. A server sends the same one again and again: only another one is parsed.

        Raises:
            HttpBrokenError: it is none.
        """
        head = self._last_head
        if head is None or head.raw != raw:
            head = self._last_head = _Head(raw)
        return head

    def take(self) -> _Connection | None:
        """Return a kept connection, the last used first."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection whose reply was read to its end."""
        if len(self._idle) < self._keep:
            self._idle.append(connection)
        else:
            connection.close()

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()


class _Whole:
    """Gathers a reply."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._headers: Mapping[str, str] = {}
        self._pieces: list[bytes] = []

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status, self._headers = status, headers

    def body(self, data: bytes) -> None:
        self._pieces.append(data)

    def end(self) -> None:
        if not self.reply.done():
            self.reply.set_result(Reply(self._status, self._headers, b"".join(self._pieces)))

    def failed(self, error: HttpRefusedError | HttpBrokenError) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)
