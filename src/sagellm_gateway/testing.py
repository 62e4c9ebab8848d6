"""An app on a real socket, in a thread: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from starlette.applications import Starlette

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.uvicorn_server import GatewayServer, bind, server_of

__all__ = ["Running", "running"]


class Running:
    """A served app.

    Attributes:
        server: the uvicorn server.
        port: where it listens on 127.0.0.1.
    """

    def __init__(self, server: GatewayServer, port: int, thread: threading.Thread) -> None:
        self.server = server
        self.port = port
        self.thread = thread

    @property
    def url(self) -> str:
        """The root of the server, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"


class _Announced(GatewayServer):
    """Tells another thread when it listens."""

    up: threading.Event

    async def main_loop(self) -> None:
        """Announce, then serve."""
        self.up.set()
        await super().main_loop()


@contextlib.contextmanager
def running(app: Starlette, config: GatewayConfig | None = None) -> Iterator[Running]:
    """Serve `app` on a port that the system chooses; leaving the block stops it.

    Raises:
        RuntimeError: the app did not start.
    """
    config = config or app.state.gateway.config
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
        yield Running(server, sock.getsockname()[1], thread)
    finally:
        server.should_exit = True
        thread.join(30)
