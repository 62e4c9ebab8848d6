"""The engine process as its clients see it; `counting_engine.py` stands in for a model."""

import asyncio
from pathlib import Path

import pytest
from counting import CountingEngine, request
from engine_server import Peer, serving_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_core.listener import listen_tcp
from sagellm_core.server import EXIT_ENGINE_DIED, EXIT_OK, EngineServer
from sagellm_protocol import wire
from sagellm_protocol.errors import ErrorCode


def serving(tmp_path: Path, *, step_s: float = 0.0, heartbeat_s: float = 0.05, **options):
    """A counting engine, served."""
    return serving_engine(tmp_path, CountingEngine(step_s=step_s), heartbeat_s=heartbeat_s, **options)


async def test_tokens_of_a_stream(tmp_path):
    """A submitted sequence comes back token by token and ends with its reason."""
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.send(wire.Submit(stream=1, request=request()))
        assert await peer.tokens(1) == [101, 102, 103, 104, 105]


async def test_deltas_of_a_step_share_a_frame(tmp_path):
    """Tokens that several streams gain in one turn of the loop leave in one frame."""
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.send(*[wire.Submit(stream=i, request=request(request_id=f"r{i}")) for i in range(8)])
        first = await peer.receive()
        assert isinstance(first, wire.Deltas)
        assert {number for number, _ in first.deltas} == set(range(8))


async def test_dropped_connection_aborts_its_streams(tmp_path):
    """When a client vanishes, the sequences that it submitted are aborted, and no others."""
    async with serving(tmp_path) as served:
        one, other = await served.peer(), await served.peer()
        one.send(wire.Submit(stream=1, request=request(4, request_id="mine")))
        other.send(wire.Submit(stream=1, request=request(4, request_id="theirs")))
        await served.engine.until(lambda e: e.running == {"mine", "theirs"})
        one.writer.transport.abort()
        await served.engine.until(lambda e: e.aborted)
        assert served.engine.aborted == ["mine"]
        assert served.engine.running == {"theirs"}


async def test_abort_and_resubmit_under_the_same_id(tmp_path):
    """A request id can be used again at once after an abort: the new stream waits until the engine has let go of the old one."""
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.send(wire.Submit(stream=1, request=request(4)))
        await served.engine.until(lambda e: e.running)
        peer.send(wire.Abort(stream=1), wire.Submit(stream=2, request=request()))
        assert await peer.tokens(2) == [101, 102, 103, 104, 105]
        assert served.engine.aborted == ["r"]


@pytest.mark.parametrize(
    ("command", "code"), [(0, ErrorCode.RESOURCE_EXHAUSTED), (2, ErrorCode.INTERNAL)], ids=["refused", "bug"]
)
async def test_failure_of_one_stream(tmp_path, command, code):
    """A sequence that fails ends with its own typed error, without inner details, and the connection goes on."""
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.send(
            wire.Submit(stream=1, request=request(command)), wire.Submit(stream=2, request=request(request_id="ok"))
        )
        failures, tokens = [], []
        while len(tokens) < 5:
            message = await peer.receive()
            if isinstance(message, wire.Failure):
                failures.append(message)
            else:
                tokens += [t for _, d in message.deltas for t in d.token_ids]
        (failure,) = failures
        assert (failure.stream, failure.error.code) == (1, code)
        assert "secret" not in failure.error.message


async def test_dead_engine_ends_the_server(tmp_path):
    """When the engine dies its streams are told, and the process ends with its own status."""
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.send(wire.Submit(stream=1, request=request(1)))
        failure = await peer.receive()
        assert (failure.stream, failure.error.code) == (1, ErrorCode.ENGINE_DIED)
        assert await served.task == EXIT_ENGINE_DIED
        assert served.engine.closed


async def test_calls(tmp_path):
    """Status, describe and abort answer their own call; an unknown method is refused and the connection goes on."""
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.send(
            wire.call(1, "status", wire.NoParams()),
            wire.call(2, "describe", wire.NoParams()),
            wire.call(3, "abort", wire.AbortParams(request_id="nobody")),
            wire.call(4, "fly", wire.NoParams()),
            wire.call(5, "abort", wire.NoParams()),
        )
        replies = {m.call_id: m for m in [await peer.receive() for _ in range(5)]}
        assert wire.decode_result("status", replies[1]).engine_id == "counting"
        assert wire.decode_result("describe", replies[2]).vocab_size == 100_000
        assert wire.decode_result("abort", replies[3]) is False
        assert replies[4].error.code is ErrorCode.NOT_IMPLEMENTED
        assert replies[5].error.code is ErrorCode.INVALID_ARGUMENT


async def test_heartbeats_carry_progress(tmp_path):
    """Heartbeats come unasked and their progress counter grows with the work."""
    async with serving(tmp_path, heartbeat_s=0.01, step_s=0.002) as served:
        peer = await served.peer()
        peer.send(wire.Submit(stream=1, request=request(max_tokens=2000)))
        seen = []
        while len(set(seen)) < 3:
            size = int.from_bytes(await peer.reader.readexactly(4), "big")
            message = wire.decode_from_engine(await peer.reader.readexactly(size))
            if isinstance(message, wire.Heartbeat):
                seen.append(message.status.steps)
        assert seen == sorted(seen)


async def test_drain_finishes_what_runs_and_refuses_the_rest(tmp_path):
    """Draining lets running sequences finish, refuses new ones as unavailable, and then ends the process with 0."""
    async with serving(tmp_path, step_s=0.01) as served:
        peer = await served.peer()
        peer.send(wire.Submit(stream=1, request=request(max_tokens=10)))
        await peer.receive()
        served.server.stop()
        peer.send(wire.Submit(stream=2, request=request(request_id="late")))
        tokens, failures, end = [], [], None
        while (message := await peer.receive()) is not None:
            match message:
                case wire.Deltas():
                    tokens += [t for n, d in message.deltas for t in d.token_ids if n == 1]
                case wire.Failure():
                    failures.append((message.stream, message.error.code))
                case wire.Goodbye():
                    end = message.reason
        assert tokens == list(range(101, 111))
        assert failures == [(2, ErrorCode.UNAVAILABLE)]
        assert end == "the engine is shutting down"
        assert await served.task == EXIT_OK


async def test_drain_has_an_end(tmp_path):
    """A sequence that does not finish within the grace time is ended with a retryable error."""
    async with serving(tmp_path, grace_s=0.05) as served:
        peer = await served.peer()
        peer.send(wire.Submit(stream=1, request=request(4)))
        await served.engine.until(lambda e: e.running)
        served.server.stop()
        failure = await peer.receive()
        assert failure.stream == 1
        assert failure.error.retryable
        assert await served.task == EXIT_OK
        assert served.engine.aborted == ["r"]


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (wire.Hello(version=99), ErrorCode.UNSUPPORTED_VERSION),
        (wire.Hello(engine_id="another"), ErrorCode.INVALID_ARGUMENT),
        (wire.Submit(stream=1, request=request()), ErrorCode.UNAUTHENTICATED),
        (b"GET / HTTP/1.1\r\n\r\n", ErrorCode.INVALID_ARGUMENT),
        (b"\xff\xff\xff\xff", ErrorCode.INVALID_ARGUMENT),
        (b"\x00\x00\x00\x04\xc1\xc1\xc1\xc1", ErrorCode.INVALID_ARGUMENT),
    ],
    ids=["version", "other engine", "no hello", "http", "huge", "garbage"],
)
async def test_hostile_beginning(tmp_path, first, code):
    """A peer that does not begin properly is told why and cut off; the server goes on."""
    async with serving(tmp_path) as served:
        peer = await served.peer(hello=None)
        peer.send(first)
        failure = await peer.receive()
        assert isinstance(failure, wire.Failure)
        assert failure.error.code is code
        assert await peer.receive() is None
        good = await served.peer()
        good.send(wire.Submit(stream=1, request=request()))
        assert len(await good.tokens(1)) == 5


async def test_garbage_after_hello(tmp_path):
    """Garbage in the middle of a connection ends it and aborts its sequences."""
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.send(wire.Submit(stream=1, request=request(4)))
        await served.engine.until(lambda e: e.running)
        peer.send(b"\x00\x00\x00\x02\xc1\xc1")
        failure = await peer.receive()
        assert failure.stream is None
        await served.engine.until(lambda e: e.aborted)
        assert served.engine.aborted == ["r"]


FRAGMENTS = [
    wire.encode_frame(wire.Hello()),
    wire.encode_frame(wire.Submit(stream=1, request=request(max_tokens=3))),
    wire.encode_frame(wire.Submit(stream=2, request=request(4, request_id="waits"))),
    wire.encode_frame(wire.Submit(stream=3, request=request(2, request_id="bug"))),
    wire.encode_frame(wire.Abort(stream=2)),
    wire.encode_frame(wire.Abort(stream=99)),
    wire.encode_frame(wire.call(5, "status", wire.NoParams())),
    wire.encode_frame(wire.call(6, "abort", wire.NoParams())),
    wire.encode_frame(wire.Cancel(call_id=5)),
    wire.encode_frame(wire.Goodbye(reason="x")),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=30), max_size=12), st.integers(0, 10**6))
async def test_any_bytes_in_any_order(tmp_path, pieces, cut):
    """Whatever a peer sends, in whatever order and however broken, the server goes on for others and holds nothing for it."""
    stream = b"".join(pieces)
    async with serving(tmp_path) as served:
        bad = await served.peer(hello=None)
        bad.send(stream[: cut % (len(stream) + 1)] if cut % 3 == 0 else stream)
        good = await served.peer()
        good.send(wire.Submit(stream=1, request=request(request_id="good")))
        assert await good.tokens(1) == [101, 102, 103, 104, 105]
        bad.writer.transport.abort()
        await served.engine.until(lambda e: not e.running)
        assert len(served.server.connections) <= 2


async def test_silent_peer(tmp_path, monkeypatch):
    """A peer that connects and says nothing is cut off."""
    monkeypatch.setattr("sagellm_core.connection.HELLO_TIMEOUT_S", 0.02)
    async with serving(tmp_path) as served:
        peer = await served.peer(hello=None)
        failure = await peer.receive()
        assert failure.error.code is ErrorCode.UNAUTHENTICATED


async def test_client_that_does_not_read(tmp_path, monkeypatch):
    """A client that lets its tokens pile up is cut off and its sequences are aborted."""
    monkeypatch.setattr("sagellm_core.connection.MAX_OUTBOUND_BYTES", 1000)
    async with serving(tmp_path) as served:
        peer = await served.peer()
        peer.writer.transport.pause_reading()
        monkeypatch.setattr(served.engine, "step_s", 0)
        peer.send(wire.Submit(stream=1, request=request(max_tokens=1_000_000)))
        await served.engine.until(lambda e: e.aborted)
        assert served.engine.aborted == ["r"]
        peer.writer.transport.abort()


async def test_token_over_tcp():
    """Over TCP a client without the token is refused, and one with it is served."""
    engine = CountingEngine()
    listener = listen_tcp("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = EngineServer(engine, await engine.describe(), listener, token="s3cret")
    task = asyncio.create_task(server.run())
    await asyncio.sleep(0)
    for token, expected in (("", wire.Failure), ("wrong", wire.Failure), ("s3cret", wire.Welcome)):
        peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
        peer.send(wire.Hello(token=token))
        answer = await peer.receive()
        assert isinstance(answer, expected)
        if isinstance(answer, wire.Failure):
            assert answer.error.code is ErrorCode.UNAUTHENTICATED
            assert "s3cret" not in answer.error.message
        peer.writer.transport.abort()
    server.stop()
    assert await task == EXIT_OK
