"""Answers as our server writes them: one packet where it can be, and nothing that the application did not mean."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest
from starlette.routing import Route

from sagellm_gateway.server import create_app
from sagellm_gateway.testing import running
from sagellm_gateway.uvicorn_server import BoundedProtocol

pytestmark = pytest.mark.skipif(os.environ.get("SAGELLM_TEST_SERVER") == "granian", reason="uvicorn's protocol")


def start(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Late:
    """Sends the head, and the body when it is told to."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.loop, self.gate = asyncio.get_running_loop(), asyncio.Event()
        await send(start())
        await self.gate.wait()
        await send(body(b"late"))

    def go(self) -> None:
        self.loop.call_soon_threadsafe(self.gate.set)


class Says:
    """Sends a head, and a body at once."""

    def __init__(self, header: tuple[bytes, bytes], data: bytes) -> None:
        self.header, self.data = header, data

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send(start(self.header))
        await send(body(self.data))


SPLIT = Says((b"x-name", b"one\r\nset-cookie: stolen=1"), b"never")
SHORT = Says((b"content-length", b"5"), b"abc")
WHOLE = Says((b"content-length", b"5"), b"abcde")


class Client:
    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)

    def ask(self, path: str, method: str = "GET") -> None:
        self.sock.sendall(f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())

    def until(self, end: bytes) -> bytes:
        data = b""
        while not data.endswith(end):
            piece = self.sock.recv(65536)
            data += piece
            if not piece:
                break
        return data


class Counted:
    """A transport that remembers what was written to it."""

    def __init__(self, transport: Any, writes: list[bytes]) -> None:
        self._transport, self._writes = transport, writes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._writes.append(data)
        self._transport.write(data)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every write to a client of the server, in order."""
    made, seen = BoundedProtocol.connection_made, []
    monkeypatch.setattr(BoundedProtocol, "connection_made", lambda self, real: made(self, Counted(real, seen)))
    return seen


@pytest.fixture
def client(manager: Any, writes: list[bytes]) -> Any:
    late = Late()
    app = create_app(manager)
    for path, answer in {"/late": late, "/split": SPLIT, "/short": SHORT, "/whole": WHOLE}.items():
        app.router.routes.append(Route(path, answer))
    with running(app) as server:
        client = Client(server.port)
        client.late = late
        yield client
        client.sock.close()


def test_a_head_does_not_wait_for_its_body(client: Any) -> None:
    """The head of an answer whose body is not there yet is sent at once."""
    client.ask("/late")
    head = client.until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"late" not in head
    client.late.go()
    assert client.until(b"0\r\n\r\n") == b"4\r\nlate\r\n0\r\n\r\n"


def test_a_head_and_its_body_are_one_packet(client: Any, writes: list[bytes]) -> None:
    """What follows the head at once goes to the socket with it, in one write."""
    client.ask("/whole")
    assert client.until(b"\r\n\r\nabcde") == b"".join(writes)
    assert len(writes) == 1


def test_a_line_break_in_a_header_never_leaves(client: Any) -> None:
    """A header value that would begin a header of its own ends the connection instead."""
    client.ask("/split")
    assert b"stolen" not in client.until(b"never")


def test_a_body_of_another_length_ends_the_connection(client: Any) -> None:
    """A body that is shorter than its content-length is not followed by the next answer."""
    client.ask("/short")
    assert not client.until(b"\0").endswith(b"abc")  # until the connection ends


def test_head_has_no_body_and_keeps_the_connection(client: Any) -> None:
    """HEAD answers with the head alone, and the next request on the connection is answered."""
    client.ask("/whole", "HEAD")
    assert b"content-length: 5" in client.until(b"\r\n\r\n")
    client.ask("/whole")
    assert client.until(b"abcde").endswith(b"\r\n\r\nabcde")
