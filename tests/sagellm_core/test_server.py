"""The engine process as its clients see it; `counting_engine.py` stands in for a model."""

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_core.listener import listen_tcp, listen_unix
from sagellm_core.server import EXIT_ENGINE_DIED, EXIT_OK, EngineServer
from sagellm_protocol import EngineRequest, SamplingParams, wire
from sagellm_protocol.errors import ErrorCode, InvalidArgumentError, UnavailableError

COUNTING = Path(__file__).with_name("counting_engine.py")


def load_counting():
    spec = importlib.util.spec_from_file_location("counting_engine", COUNTING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CountingEngine


def request(last: int = 100, max_tokens: int = 5, request_id: str = "r") -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=(50, last), sampling=SamplingParams(seed=1, max_tokens=max_tokens)
    )


class Peer:
    """A client that speaks raw frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *messages: object) -> None:
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
        seen: list[int] = []
        while True:
            message = await self.receive()
            assert isinstance(message, wire.Deltas), message
            for number, delta in message.deltas:
                if number == stream:
                    seen += delta.token_ids
                    if delta.finish_reason is not None:
                        return seen


class Served:
    """A server on a Unix socket in this process."""

    def __init__(self, path: Path, engine, server: EngineServer, task: asyncio.Task[int]) -> None:
        self.path, self.engine, self.server, self.task = path, engine, server, task
        self.peers: list[Peer] = []

    async def peer(self, hello: object = wire.Hello()) -> Peer:
        peer = Peer(*await asyncio.open_unix_connection(str(self.path)))
        self.peers.append(peer)
        if hello is not None:
            peer.send(hello)
            welcome = await peer.receive()
            assert isinstance(welcome, wire.Welcome), welcome
        return peer


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, **options):
    path = tmp_path / "e.sock"
    engine = load_counting()(step_s=options.pop("step_s", 0.0))
    options.setdefault("heartbeat_s", 0.05)
    server = EngineServer(engine, await engine.describe(), listen_unix(path), **options)
    task = asyncio.create_task(server.run())
    await asyncio.sleep(0)
    served = Served(path, engine, server, task)
    try:
        yield served
    finally:
        server._finish(EXIT_OK)
        await task
        for peer in served.peers:
            peer.writer.transport.abort()
        await asyncio.sleep(0)


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
    engine = load_counting()()
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


def test_port_in_use():
    """A taken port is reported with the port and the cure."""
    with listen_tcp("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}.*choose another port"):
            listen_tcp("127.0.0.1", port)


def test_unix_socket_is_private(tmp_path):
    """The socket can be used by its owner only."""
    with listen_unix(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_unix_socket_of_a_dead_engine_is_replaced(tmp_path):
    """A socket that nobody listens on is replaced; a living one is not, and a file that is no socket never."""
    path = tmp_path / "s"
    listen_unix(path).close()
    with listen_unix(path), pytest.raises(UnavailableError, match="listens on"):
        listen_unix(path)
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(InvalidArgumentError, match="not a socket"):
        listen_unix(plain)
    assert plain.read_text() == "precious"


def test_long_socket_path(tmp_path):
    """A path that the kernel cannot take is refused with both numbers."""
    with pytest.raises(InvalidArgumentError, match="the kernel takes 107"):
        listen_unix(tmp_path / ("x" * 120))


def run_module(*argv: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k != "SAGELLM_ENGINE_TOKEN"} | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "sagellm_core.server", *argv]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_tcp_without_token():
    """TCP without a token does not start, and says which variable to set."""
    done = run_module("--config", '{"model":"mock"}', "--tcp", "127.0.0.1:0")
    assert (done.returncode, done.stderr) == (
        3,
        "engine cannot start: --tcp needs a token: set SAGELLM_ENGINE_TOKEN, or use --socket\n",
    )


@pytest.mark.parametrize("config", ["nonsense", '{"model":"mock","colour":1}', '{"model":"/no/such/model.gguf"}'])
def test_bad_configuration(tmp_path, config):
    """A configuration that cannot be used, or a missing model file, is one line on stderr and status 3."""
    done = run_module("--config", config, "--socket", str(tmp_path / "s"))
    assert done.returncode == 3
    assert done.stderr.startswith("engine cannot start: ")
    assert done.stderr.count("\n") == 1


def spawn(
    tmp_path: Path, *extra: str, config: dict[str, object] | None = None, **kwargs
) -> tuple[subprocess.Popen, int]:
    """Start a real process; returns it and the read end of its status pipe."""
    read, write = os.pipe()
    argv = [sys.executable, str(COUNTING), "--config", msgspec.json.encode(config or {}).decode()]
    argv += ["--socket", str(tmp_path / "p.sock"), "--status-fd", str(write), *extra]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, pass_fds=[write, *kwargs.pop("pass_fds", [])], **kwargs)
    os.close(write)
    return process, read


def report_of(read: int) -> wire.StartReport:
    with os.fdopen(read) as pipe:
        return msgspec.json.decode(pipe.readline(), type=wire.StartReport)


def test_process_reports_ready_and_ends_on_sigterm(tmp_path):
    """A process reports its address when it can be reached, ends with 0 on SIGTERM, and removes its socket."""
    process, read = spawn(tmp_path)
    assert report_of(read).address == f"unix://{tmp_path}/p.sock"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "p.sock"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert not (tmp_path / "p.sock").exists()


def test_start_failure_is_typed(tmp_path):
    """A start that fails ends with 3, one line on stderr without a traceback, and the typed error on the pipe."""
    process, read = spawn(tmp_path, config={"bad_model": True})
    error = report_of(read).error
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3
    assert error.code is ErrorCode.MODEL_FILE
    assert err.decode() == "engine cannot start: weights are truncated at byte 12: fetch the file again\n"


def test_process_ends_with_its_parent_when_asked(tmp_path):
    """With --parent-fd the process ends when the other end is closed, whatever way its parent died."""
    parent_read, parent_write = os.pipe()
    process, read = spawn(tmp_path, "--parent-fd", str(parent_read), pass_fds=[parent_read])
    os.close(parent_read)
    report_of(read)
    os.close(parent_write)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err


@pytest.mark.parametrize("command", [3, 4, 5], ids=["loop blocked", "no progress", "interpreter lock held"])
def test_watchdog_dumps_stacks(tmp_path, command):
    """A process whose work makes no progress, however it hangs, prints the stacks of all threads and ends with 1."""
    process, read = spawn(tmp_path, "--hang-timeout", "1", "--heartbeat", "0.1")
    report_of(read)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "p.sock"))
        submit = wire.Submit(stream=1, request=request(command))
        client.sendall(wire.encode_frame(wire.Hello()) + wire.encode_frame(submit))
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"Timeout (0:00:01)!" in err
    assert b"counting_engine.py" in err or command == 4


def test_watchdog_leaves_work_alone(tmp_path):
    """Slow work that makes progress, and idleness, outlast the watchdog."""
    process, read = spawn(tmp_path, "--hang-timeout", "0.5", "--heartbeat", "0.1", config={"step_s": 0.2})
    report_of(read)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(tmp_path / "p.sock"))
        submit = wire.Submit(stream=1, request=request(max_tokens=8))
        client.sendall(wire.encode_frame(wire.Hello()) + wire.encode_frame(submit))
        decoder, reason = wire.FrameDecoder(), None
        while reason is None:
            for message in map(wire.decode_from_engine, decoder.feed(client.recv(65536))):
                if isinstance(message, wire.Deltas):
                    reason = message.deltas[-1][1].finish_reason
        time.sleep(0.8)
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0
