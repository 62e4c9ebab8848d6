"""An app on a real socket, in a thread: for tests and benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

from starlette.applications import Starlette

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.listen import bind
from sagellm_gateway.uvicorn_server import GatewayServer, server_of

__all__ = ["Running", "running"]

Kind = Literal["uvicorn", "granian"]


class Running:
    """A served app.

    Attributes:
        server: the server object.
        port: where it listens on 127.0.0.1.
        kind: which server it is.
    """

    def __init__(self, server: Any, port: int, kind: Kind) -> None:
        self.server = server
        self.port = port
        self.kind = kind

    @property
    def url(self) -> str:
        """The root of the server, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def running(app: Starlette, config: GatewayConfig | None = None, kind: Kind | None = None) -> Iterator[Running]:
    """Serve `app` on a port that the system chooses; leaving the block stops it.

    Args:
        app: from `create_app`.
        config: settings; None takes those of `app`.
        kind: the server; None takes that of the variable ``SAGELLM_TEST_SERVER``, or uvicorn.

    Raises:
        RuntimeError: the app did not start.
    """
    config = config or app.state.gateway.config
    chosen = kind or os.environ.get("SAGELLM_TEST_SERVER", "uvicorn")
    with _on_granian(app, config) if chosen == "granian" else _on_uvicorn(app, config) as served:
        yield served


class _Announced(GatewayServer):
    """Tells another thread when it listens."""

    up: threading.Event

    async def main_loop(self) -> None:
        """Announce, then serve."""
        self.up.set()
        await super().main_loop()


@contextlib.contextmanager
def _on_uvicorn(app: Starlette, config: GatewayConfig) -> Iterator[Running]:
    sock = bind("127.0.0.1", 0)
    server = server_of(app, config)
    server.__class__ = _Announced
    assert isinstance(server, _Announced)
    server.up = threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[sock])
        finally:
            server.up.set()

    thread = threading.Thread(target=serve, name="gateway", daemon=True)
    thread.start()
    server.up.wait(30)
    if not server.started:
        raise RuntimeError("the gateway did not start within 30 s")
    try:
        yield Running(server, sock.getsockname()[1], "uvicorn")
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def _on_granian(app: Starlette, config: GatewayConfig) -> Iterator[Running]:
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.server.embed import Server

    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    server = Server(
        app,
        port=port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        # Its default lets 128 requests in at a time: as many slow clients would shut everybody else out.
        backlog=2048,
        backpressure=config.limits.in_flight,
        http1_settings=HTTP1Settings(header_read_timeout=round(config.timeouts.header * 1000)),
    )
    loop = asyncio.new_event_loop()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(server.serve())

    thread = threading.Thread(target=serve, name="gateway", daemon=True)
    thread.start()
    _until_it_answers(port)
    try:
        yield Running(server, port, "granian")
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(30)
        loop.close()


def _until_it_answers(port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError("the gateway did not start within 30 s")
