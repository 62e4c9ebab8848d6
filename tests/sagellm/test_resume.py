"""Streams that break: over a real socket that is cut, and with the gateway's process killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sagellm import UnifiedInferenceClient
from sagellm.transport import Place, RetryPolicy, sse_chunks
from sagellm_protocol.errors import UnavailableError

_ANSWER: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True}


class CuttingProxy:
    """A TCP proxy in front of a server; each connection in turn is cut after so many bytes of the reply (None: never)."""

    def __init__(self, port: int, cuts: list[int | None]) -> None:
        self._port = port
        self._cuts = cuts
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client, self._cuts.pop(0)), daemon=True).start()

    def _serve(self, client: socket.socket, left: int | None) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            self.requests.append("")
            threading.Thread(target=self._forward, args=(client, server, len(self.requests) - 1), daemon=True).start()
            while data := server.recv(256):
                client.sendall(data[:left])
                if left is not None and len(data) > left:
                    break
                left = left if left is None else left - len(data)
            for each in (client, server):  # a close alone waits for the other thread
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _forward(self, client: socket.socket, server: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):  # the connection was cut
            while data := client.recv(65536):
                self.requests[number] += data.decode()
                server.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def proxies() -> Iterator[list[CuttingProxy]]:
    made: list[CuttingProxy] = []
    yield made
    for proxy in made:
        proxy.close()


def texts(client: UnifiedInferenceClient, **options: Any) -> dict[int, str]:
    """Return the text of each choice, as its deltas add up."""
    got: dict[int, str] = {}
    for delta in client.chat("hello", stream=True, **{**_ANSWER, **options}):
        for choice in delta["choices"]:
            got[choice["index"]] = got.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return got


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("cut", [250, 700, 1111, 1500, 2222, 4000])
def test_a_cut_connection_is_taken_up_by_the_events_id(
    mock_server: Any, proxies: list[CuttingProxy], n: int, cut: int
) -> None:
    """Wherever the connection is cut, and twice, each choice's text is whole; the server is asked to go on, not to begin again."""
    port = int(re.search(r":(\d+)", mock_server.base_url)[1])  # type: ignore[index]
    proxy = CuttingProxy(port, [cut, cut, None])
    proxies.append(proxy)
    with UnifiedInferenceClient(mock_server.base_url, "mock") as straight:
        whole = texts(straight, n=n)
    with UnifiedInferenceClient(proxy.url, "mock", retries=RetryPolicy(first_s=0.001)) as client:
        assert texts(client, n=n) == whole
    assert len(whole) == n
    head = [request.partition("\r\n\r\n")[0].lower() for request in proxy.requests]
    assert "x-stream-resume: true" in head[0]
    assert len(head) == 3
    assert (
        cut <= 700
        or all(  # before that there is no event to go on from
            "last-event-id: chatcmpl-" in later for later in head[1:]
        )
    )


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0].replace("Z", "")
    except FileNotFoundError:
        return ""


@pytest.mark.slow
def test_the_killed_gateways_stream_goes_on(start_server: Any, tmp_path: Path) -> None:
    """With `--workers 2`, kill -9 of both workers in the middle of an answer costs the client nothing but time."""
    server = start_server("--mock", "--workers", "2", env={"XDG_STATE_HOME": str(tmp_path)})
    (line,) = [line for line in server.output if line.startswith("workers")]
    workers = [int(number) for number in re.findall(r"\d+", line.split("pid", 1)[1].split("(")[0])]
    options = {**_ANSWER, "max_tokens": 300}
    with UnifiedInferenceClient(server.base_url, "mock", retries=RetryPolicy(attempts=40, longest_s=0.5)) as client:
        whole = "".join(delta.text for delta in client.chat("hello", stream=True, **options))
        got = ""
        for delta in client.chat("hello", stream=True, **options):
            got += delta.text
            if workers and len(got) > 20:
                for pid in workers:
                    os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + 10
                while any(map(_state, workers)) and time.monotonic() < deadline:
                    time.sleep(0.01)
                workers = []
        assert not workers
        assert got == whole


def test_events_of_one_id_come_together_or_not_at_all() -> None:
    """Events in front of an id that never arrived are not given out: the server sends them again."""
    place = Place()

    async def lines() -> AsyncIterator[str]:
        for line in ("id: a.0", 'data: {"k": 1}', 'data: {"k": 2}', "id: a.5", 'data: {"k": 3}', 'data: {"k": 4}'):
            yield line

    async def read() -> list[int]:
        got = []
        with pytest.raises(UnavailableError):
            async for chunk in sse_chunks(lines(), place):
                got.append(chunk["k"])
                if chunk["k"] == 1:
                    assert place.event_id == "a.0"
        return got

    assert asyncio.run(read()) == [1, 2, 3]
    assert place.event_id == "a.5"
