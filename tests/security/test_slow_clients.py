"""Clients that are slow on purpose: others keep being served, and the slow ones are cut in time."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import pytest

from sagellm_gateway.testing import Running

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
ATTACKS = {
    "no byte at all": b"",
    "half a head": HEAD,
    "head that never ends": HEAD + b"x-a: b\r\n" * 20,
    "body that never comes": HEAD + b"content-length: 100\r\n\r\n",
    "body that stops": HEAD + b"content-length: 100\r\n\r\n" + b'{"model": ',
    "chunk that stops": HEAD + b"transfer-encoding: chunked\r\n\r\nff\r\nabc",
}


@pytest.fixture
def others(target: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=target.url, timeout=2, trust_env=False) as client:
        yield client


@pytest.mark.parametrize("name", ATTACKS)
def test_slow_clients_harm_nobody(target: Running, others: httpx2.Client, name: str) -> None:
    """With 200 such connections open every other request is answered within two seconds, and all of them are closed in time."""
    body = {"model": "mock", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with ExitStack() as stack:
        slow = []
        for _ in range(200):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", target.port)))
            sock.sendall(ATTACKS[name])
            slow.append(sock)
        for _ in range(5):
            assert others.post("/v1/chat/completions", json=body).status_code == 200
        end = time.monotonic() + 15  # the bounds of this server are two seconds
        for sock in slow:
            sock.settimeout(max(0.1, end - time.monotonic()))
            while sock.recv(65536):
                pass
