"""An engine server on a Unix socket in this process, and peers that speak raw frames to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from sagellm_core.listener import listen_unix
from sagellm_core.server import EXIT_OK, EngineServer
from sagellm_protocol import wire


class Peer:
    """A client that speaks raw frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *messages: object) -> None:
        """Write messages, or bytes as they are."""
        self.writer.write(b"".join(m if isinstance(m, bytes) else wire.encode_frame(m) for m in messages))

    async def receive(self) -> object:
        """The next message that is not a heartbeat; None at the end."""
        while True:
            try:
                size = int.from_bytes(await self.reader.readexactly(4), "big")
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return None
            message = wire.decode_from_engine(await self.reader.readexactly(size))
            if not isinstance(message, wire.Heartbeat):
                return message

    async def tokens(self, stream: int) -> list[int]:
        """Read until this stream has finished; return its tokens."""
        seen: list[int] = []
        while True:
            message = await self.receive()
            assert isinstance(message, wire.Deltas), message
            for number, delta in message.deltas:
                if number == stream:
                    seen += delta.token_ids
                    if delta.finish_reason is not None:
                        return seen


PeerT = TypeVar("PeerT", bound=Peer)


class Served:
    """A server and the peers that connected to it."""

    def __init__(self, path: Path, engine: Any, server: EngineServer, task: asyncio.Task[int]) -> None:
        self.path, self.engine, self.server, self.task = path, engine, server, task
        self.peers: list[Peer] = []

    async def peer(self, hello: object = wire.Hello(), kind: type[PeerT] = Peer) -> PeerT:
        """Connect, and wait for the welcome if there is a `hello` to say."""
        peer = kind(*await asyncio.open_unix_connection(str(self.path)))
        self.peers.append(peer)
        if hello is not None:
            peer.send(hello)
            welcome = await peer.receive()
            assert isinstance(welcome, wire.Welcome), welcome
        return peer


ServedT = TypeVar("ServedT", bound=Served)


@contextlib.asynccontextmanager
async def serving_engine(
    tmp_path: Path, engine: Any, kind: type[ServedT] = Served, **options: Any
) -> AsyncIterator[ServedT]:
    """Serve `engine` on a socket below `tmp_path`; `options` are `EngineServer`'s."""
    path = tmp_path / "e.sock"
    server = EngineServer(engine, await engine.describe(), listen_unix(path), **options)
    task = asyncio.create_task(server.run())
    await asyncio.sleep(0)
    served = kind(path, engine, server, task)
    try:
        yield served
    finally:
        server._finish(EXIT_OK)
        await task
        for peer in served.peers:
            peer.writer.transport.abort()
        await asyncio.sleep(0)
