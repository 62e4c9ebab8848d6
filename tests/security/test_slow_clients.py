"""Clients that are slow on purpose: others keep being served, and the slow ones are cut in time."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
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


SLOWHTTPTEST = {
    "slow headers": ("/v1/chat/completions", ["-H", "-i", "1", "-x", "24", "-t", "POST"]),
    "slow body": ("/v1/chat/completions", ["-B", "-i", "1", "-s", "8192", "-x", "10", "-f", "application/json"]),
    "overlapping ranges": ("/openapi.json", ["-R", "-a", "10", "-b", "3000", "-t", "HEAD"]),
    "slow read": ("/openapi.json", ["-X", "-w", "512", "-y", "1024", "-n", "5", "-z", "32", "-k", "3"]),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("slowhttptest") is None, reason="slowhttptest is not installed (Debian: slowhttptest)")
@pytest.mark.parametrize("name", SLOWHTTPTEST)
def test_slowhttptest_finds_the_service_available(target: Running, others: httpx2.Client, name: str) -> None:
    """While slowhttptest holds 500 connections every other request is answered, and its own probes find the service up."""
    path, options = SLOWHTTPTEST[name]
    command = ["slowhttptest", "-c", "500", "-r", "250", "-l", "8", "-p", "3", *options, "-u", f"{target.url}{path}"]
    body = {"model": "mock", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as attack:
        answered = 0
        while attack.poll() is None:
            assert others.post("/v1/chat/completions", json=body).status_code == 200
            answered += 1
        assert attack.stdout is not None
        said = re.findall(r"service available:[^\n]*?(YES|NO)", attack.stdout.read())
    assert answered > 10
    assert said
    assert set(said) == {"YES"}
