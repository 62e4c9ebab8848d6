from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import time
from typing import Any

import httpx2
import pytest

from sagellm_gateway.config import GatewayConfig, Limits, Timeouts
from sagellm_gateway.guard import Guard
from sagellm_gateway.listen import bind
from sagellm_gateway.server import create_app
from sagellm_gateway.testing import running
from sagellm_protocol.generation import ChoiceDelta, GenerationStart


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def until(what: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


# granian has bounds of its own on heads, in hyper, and its own way to stop.
uvicorn_only = pytest.mark.skipif(os.environ.get("SAGELLM_TEST_SERVER") == "granian", reason="uvicorn's protocol")

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_closes_the_request(server: Any, manager: Any, stream: bool) -> None:
    """A client that goes away closes its generator, streaming or not."""
    manager.script = manager.events(wait=True)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(request_bytes({**CHAT, "stream": stream}))
        until(lambda: manager.open == 1)
    until(lambda: manager.open == 0, 1.0)


def test_port_in_use_is_said_clearly(server: Any) -> None:
    """A second server on the port exits with a sentence that names the port and the cure."""
    with pytest.raises(SystemExit, match=f"port {server.port} on 127.0.0.1 is in use"):
        bind("127.0.0.1", server.port)


def test_slow_reader_is_dropped_alone(manager: Any) -> None:
    """A reader that takes nothing is dropped when the queue's bound is reached; another one gets everything."""

    async def flood(request: Any) -> Any:
        yield GenerationStart(request_id=request.request_id, model="tiny", prompt_tokens=1)
        while True:
            yield ChoiceDelta(text="x" * 1000)
            await asyncio.sleep(0)

    config = GatewayConfig(limits=Limits(queued_frames=500))
    with running(create_app(manager, config)) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        manager.script = flood
        manager.requests.clear()
        slow.sendall(request_bytes({**CHAT, "stream": True}))
        until(lambda: manager.requests)
        manager.script = manager.say("fine")
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=CHAT, trust_env=False)
        assert answer.json()["choices"][0]["message"]["content"] == "fine"
        until(lambda: manager.open == 0, 20)


@uvicorn_only
def test_drain_lets_running_work_finish_and_fails_the_rest(manager: Any) -> None:
    """While draining /ready and new work are 503; what outlives the grace time ends with an error event."""
    manager.script = manager.events(ChoiceDelta(text="a"), wait=True)
    config = GatewayConfig(timeouts=Timeouts(grace=0.3))
    with (
        running(create_app(manager, config)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
        httpx2.Client(base_url=server.url, trust_env=False) as client,
    ):
        sock.sendall(request_bytes({**CHAT, "stream": True}))
        until(lambda: manager.open == 1)
        assert client.get("/ready").status_code == 200
        server.server.handle_exit(15, None)
        assert client.get("/ready").status_code == 503
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        sock.settimeout(10)
        seen = b""
        while part := sock.recv(65536):
            seen += part
        assert b"shut down before the answer was complete" in seen
        assert b"[DONE]" not in seen
    assert manager.open == 0


@uvicorn_only
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n", b"408"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000, b"431"),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{", b"408"),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n", b"413"),
        (b"\x00\x01\x02 not http\r\n\r\n", b"400"),
    ],
)
def test_slow_or_oversized_heads_and_bodies_are_cut(server: Any, sent: bytes, status: bytes) -> None:
    """A head or body that does not come in time, or is too large, gets its status and the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(5)
        sock.sendall(sent)
        seen = b""
        while part := sock.recv(65536):
            seen += part
        assert seen.split(b" ")[1] == status
        assert b'"code"' in seen


@pytest.mark.parametrize("stream", [True, False])
def test_pipelined_requests_end_with_their_connection(server: Any, manager: Any, stream: bool, caplog: Any) -> None:
    """When a client with two requests in one pipeline goes away, the one that runs is aborted and the other never begins."""
    if server.kind == "granian" and not stream:
        pytest.skip(
            "granian reads nothing while a request without a stream runs, so it does not see that the client has gone"
        )
    manager.script = manager.events(ChoiceDelta(text="a"), wait=True)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(request_bytes(body) * 2)
        until(lambda: manager.open == 1)
    until(lambda: manager.open == 0, 0.15 if stream and server.kind == "uvicorn" else 5.0)
    assert len(manager.requests) == 1
    assert not caplog.records


def guards() -> list[Guard]:
    return [thing for thing in gc.get_objects() if isinstance(thing, Guard)]


def test_requests_leave_no_cycles(http: httpx2.Client) -> None:
    """What a request made is gone when it ends, without the garbage collector: its pauses would be the tail of the latency."""
    gc.collect()
    gc.disable()
    # Of a request that a test before cancelled something may live on for a moment.
    others = guards()
    try:
        for stream in (True, False):
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
        until(lambda: all(any(guard is other for other in others) for guard in guards()))
    finally:
        gc.enable()
