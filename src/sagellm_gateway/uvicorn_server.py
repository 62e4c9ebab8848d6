"""The gateway under uvicorn: bounds on slow and oversized headers, and a SIGTERM that loses no running request."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any
from urllib.parse import unquote

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.context import Gateway
from sagellm_gateway.listen import bind, refuse_open_door

__all__ = ["GatewayServer", "calm_collector", "run", "server_of"]


_LINGER_S = 2.0
_PIPELINED = 4


class _Cycle(RequestResponseCycle):
    """One request and its answer. The head leaves together with the first bytes of the body: uvicorn writes them apart.

    A write to a socket is what costs most in a short answer, and a second packet wakes the client twice.
    """

    _head = b""

    async def send(self, message: Any) -> None:
        """ASGI's send."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if message["type"] == "http.response.start" and not self.response_started:
            self._begin(message["status"], message.get("headers", ()))
        elif message["type"] == "http.response.body" and self.response_started and not self.response_complete:
            self._body(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']} does not come next in an answer")

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        self.waiting_for_100_continue = False
        lines, said = [STATUS_LINE[status]], False
        for name, value in (*self.default_headers, *headers):
            lines.append(name + b": " + value + b"\r\n")
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"transfer-encoding":
                self.chunked_encoding = True
            elif name == b"connection" and value == b"close":
                self.keep_alive, said = False, True
        if not (self.keep_alive or said):
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        # Whatever values hold, a head has the lines that were put into it.
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header of the answer holds a line break or NUL")
        self._head = head + b"\r\n"
        asyncio.get_running_loop().call_soon(self.flush)  # if nothing follows at once

    def _body(self, body: bytes, *, more: bool) -> None:
        if self.scope["method"] == "HEAD":
            self.expected_content_length, body = 0, b""
        elif self.chunked_encoding:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0 or (self.expected_content_length and not more):
                raise RuntimeError("the answer's body is not as long as its content-length says")
        head, self._head = self._head, b""
        if head or body:
            self.transport.write(head + body)
        if not more:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    def whole_body(self) -> bytes | None:
        """Return the request's body if all of it is here, once; None if it has to be received."""
        if self.more_body or self.disconnected:
            return None
        body = bytes(self.body)
        self.body = bytearray()
        self.message_event.clear()
        self.flow.resume_reading()
        return body

    def flush(self) -> None:
        """Write a head that still waits for its body."""
        head, self._head = self._head, b""
        if head and not self.transport.is_closing():
            self.transport.write(head)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with what it lacks: a deadline and a size bound for the header block, and an end for pipelined requests.

    When a connection is lost uvicorn tells the request that was parsed last. With pipelining that is not the one that runs.
    ``scope["sagellm.on_disconnect"]`` is told who wants to know when the connection ends: cheaper than a task that waits for it.
    ``scope["sagellm.whole_body"]`` gives a body that has arrived: cheaper than to wait for it under a deadline.
    """

    header_seconds = 10.0
    header_bytes = 32 * 1024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection that never sends a request is closed too."""
        super().connection_made(transport)
        self._watcher: Callable[[], None] | None = None
        self._lost = False
        self._header_size = 0
        self._in_headers = True
        self._discarding = False
        self._running: RequestResponseCycle | None = None
        self._header_timer: asyncio.TimerHandle | None = self.loop.call_later(self.header_seconds, self._header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock; end the request that runs, and begin none of those behind it."""
        self._stop_timer()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self._lost = True
        if self._watcher is not None:
            self._watcher()

    def _watch(self, watcher: Callable[[], None] | None) -> None:
        self._watcher = watcher
        if self._lost and watcher is not None:
            self.loop.call_soon(watcher)

    def data_received(self, data: bytes) -> None:
        """Count bytes until the header block is complete."""
        if self._discarding:
            return
        if self._in_headers:
            self._header_size += len(data)
        super().data_received(data)
        if self._in_headers and self._header_size:
            self._header_is_unfinished()

    def _header_is_unfinished(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self._header_timeout)
        if self._header_size > self.header_bytes and not self.transport.is_closing():
            self._refuse(
                b"431 Request Header Fields Too Large",
                "headers_too_large",
                f"more than {self.header_bytes} bytes of headers",
            )

    def on_message_begin(self) -> None:
        """A new request (also one that was pipelined behind another) counts from zero."""
        self._in_headers = True
        super().on_message_begin()
        scope: Any = self.scope
        scope["sagellm.on_disconnect"] = self._watch

    def on_headers_complete(self) -> None:
        """The header block is in: stop the clock, and begin, or wait behind the request that runs."""
        self._in_headers = False
        self._header_size = 0
        self._stop_timer()
        parser: Any = self.parser
        scope: Any = self.scope
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = version
        if self.url.startswith(b"/") and b"#" not in self.url:
            raw_path, _, scope["query_string"] = self.url.partition(b"?")
        else:
            url = httptools.parse_url(self.url)
            raw_path, scope["query_string"] = url.path, url.query or b""
        path = raw_path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        before = self.cycle
        self.cycle = cycle = _Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        scope["sagellm.whole_body"] = cycle.whole_body
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))
        if not self.pipeline:  # else it waits behind another one
            self._running = self.cycle
        elif len(self.pipeline) < _PIPELINED:
            self.flow.resume_reading()  # whoever does not read does not see that the client has gone

    def on_response_complete(self) -> None:
        """The next bytes belong to a new header block; the next request in the pipeline begins."""
        self._in_headers = True
        self._running = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP in the OpenAI shape."""
        self._refuse(b"400 Bad Request", "invalid_http", msg.rstrip("."))

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_timeout(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if self._header_size == 0:
            self.transport.close()
        else:
            self._refuse(
                b"408 Request Timeout", "header_timeout", f"the headers did not arrive within {self.header_seconds:g} s"
            )

    def _refuse(self, status: bytes, code: str, message: str) -> None:
        body = (
            f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":"{code}"}}}}'
        ).encode()
        self._discarding = True
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
            + str(len(body)).encode() + b"\r\n\r\n" + body
        )  # fmt: skip
        # Closing with unread input resets the connection, and the client would never see the answer: half-close, swallow
        # what still comes, and end a little later.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


class GatewayServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT: /ready and new work answer 503, running work finishes within the grace time."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self.gateway = gateway
        self._drained: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop, for the signal handler."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, leave at once on the second."""
        if self._loop is None or self.gateway.draining or self.should_exit:
            super().handle_exit(sig, frame)
            return
        self.gateway.drain()
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drained = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self.gateway.finish(self.gateway.config.timeouts.grace)
        self.should_exit = True


def server_of(app: Starlette, config: GatewayConfig) -> GatewayServer:
    """Return the uvicorn server of `app`, not started."""
    timeouts, limits = config.timeouts, config.limits
    protocol: Any = type(
        "Protocol", (BoundedProtocol,), {"header_seconds": timeouts.header, "header_bytes": limits.header_bytes}
    )
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=protocol,
        ws="none",
        loop="auto",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=max(1, round(timeouts.keep_alive)),
        timeout_graceful_shutdown=5,
        proxy_headers=False,
    )
    return GatewayServer(settings, app.state.gateway)


def run(app: Starlette, config: GatewayConfig) -> None:
    """Bind and serve until a signal.

    Raises:
        SystemExit: the address cannot be bound, or it is open to the network and no key is set.
    """
    refuse_open_door(app.state.gateway, config)
    sock = bind(config.host, config.port)
    server = server_of(app, config)
    calm_collector()
    server.run(sockets=[sock])


def calm_collector() -> None:
    """Spare the garbage collector what is there now, and let it look at the rest more seldom. For a whole process, once it serves.

    What start-up made lives as long as the process: collections that walk it would show up in the tail of every latency.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
