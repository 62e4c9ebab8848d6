"""The least that a proxy in Python can be: bytes of requests to engines in turn, bytes of answers back. `python router_floor.py PORT ENGINE_PORT...`.

No router: it checks nothing, knows no engine's load, and loses every stream whose engine dies. What it adds is the floor under what a router
can add on the same machine.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

import httptools
import uvloop


class Engine(asyncio.Protocol):
    """A kept connection to an engine; answers go to the client that it serves."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        client = self.client
        self.parser.feed_data(data)
        client.transport.write(data)

    def on_message_complete(self) -> None:
        self.client.idle.append(self)
        self.parser = httptools.HttpResponseParser(self)


class Client(asyncio.Protocol):
    engines: itertools.cycle
    pools: dict[int, list[Engine]]

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        data, self.data = self.data, b""
        port = next(self.engines)
        self.idle = self.pools[port]
        if self.idle:
            self.send(self.idle.pop(), data)
        else:
            self.task = asyncio.get_running_loop().create_task(self.connect(port, data))

    async def connect(self, port: int, data: bytes) -> None:
        _transport, engine = await asyncio.get_running_loop().create_connection(Engine, "127.0.0.1", port)
        self.send(engine, data)

    def send(self, engine: Engine, data: bytes) -> None:
        engine.client = self
        engine.transport.write(data)


async def main() -> None:
    port, *engines = map(int, sys.argv[1:])
    Client.engines, Client.pools = itertools.cycle(engines), {engine: [] for engine in engines}
    server = await asyncio.get_running_loop().create_server(Client, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
