"""The client's end of the wire, against scripted peers; the real engine process is in test_process_driver."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from sagellm_control_plane.live.wire_client import WireEngineClient, WireTimeouts
from sagellm_protocol import EngineDescription, EngineRequest, EngineStatus, SamplingParams, TokenDelta, wire
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.errors import (
    DeadlineExceededError,
    EngineDiedError,
    InternalError,
    InvalidArgumentError,
    ProtocolVersionError,
    ResourceExhaustedError,
    SageError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.ports import EngineClient

DESCRIPTION = EngineDescription(
    engine_id="e", model="m", architecture="a", backend="b", device="cpu", vocab_size=10, context_length=99, block_size=16,
    n_blocks=4, max_batch_tokens=32, max_sequences=4,
)  # fmt: skip


def request(request_id: str = "r") -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=(1,), sampling=SamplingParams(seed=1, max_tokens=9))


def tokens(stream: int, *ids: int, finish: str | None = None, request_id: str = "r") -> wire.Deltas:
    return wire.Deltas(deltas=((stream, TokenDelta(request_id=request_id, token_ids=ids, finish_reason=finish)),))


class Engine:
    """The other end of one connection, driven by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *messages: object) -> None:
        self.writer.write(b"".join(m if isinstance(m, bytes) else wire.encode_frame(m) for m in messages))

    async def receive(self) -> object:
        size = int.from_bytes(await self.reader.readexactly(4), "big")
        return wire.decode_to_engine(await self.reader.readexactly(size))

    async def welcome(self, methods: tuple[str, ...] = ("abort", "status")) -> wire.Hello:
        hello = await self.receive()
        self.send(wire.Welcome(description=DESCRIPTION, methods=methods, heartbeat_s=1.0))
        return hello


@contextlib.asynccontextmanager
async def engine_that(tmp_path: Path, script: Callable[[Engine], Awaitable[None]], **options):
    """A client of an engine that follows `script` on every connection; a failing script fails the test."""
    path, tasks, failures = str(tmp_path / "e"), [], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        try:
            await script(Engine(reader, writer))
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionResetError):
            pass
        except AssertionError as exc:
            failures.append(exc)
        finally:
            writer.transport.abort()

    server = await asyncio.start_unix_server(serve, path)
    client = WireEngineClient(options.pop("engine_id", "e"), path, **options)
    try:
        yield client
    finally:
        await client.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not failures, failures


async def lost(client: WireEngineClient) -> None:
    """Wait until the end of file has arrived."""
    while client.connected:  # noqa: ASYNC110 (there is no event: the next request finds out)
        await asyncio.sleep(0)


async def collect(client: WireEngineClient, request_id: str = "r") -> list[int]:
    return [t async for delta in client.stream(request(request_id)) for t in delta.token_ids]


def test_is_an_engine_client():
    """It has the port's methods."""
    assert isinstance(WireEngineClient("e", "/nowhere"), EngineClient)


async def test_streams_share_one_connection(tmp_path):
    """Interleaved deltas reach the stream whose number they carry, over one connection."""
    connections = 0

    async def script(engine: Engine) -> None:
        nonlocal connections
        connections += 1
        await engine.welcome()
        first, second = await engine.receive(), await engine.receive()
        for k in range(3):
            engine.send(tokens(first.stream, k), tokens(second.stream, 10 + k))
        engine.send(tokens(second.stream, finish="stop"), tokens(first.stream, finish="length"))
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        one, other = await asyncio.gather(collect(client, "a"), collect(client, "b"))
    assert (one, other, connections) == ([0, 1, 2], [10, 11, 12], 1)


async def test_end_of_file_is_engine_died(tmp_path):
    """When the engine goes away every open stream ends with EngineDiedError, after the tokens that came before."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        for _ in range(2):
            engine.send(tokens((await engine.receive()).stream, 5))

    async with engine_that(tmp_path, script) as client:

        async def one(request_id: str) -> list[int]:
            seen = []
            with pytest.raises(EngineDiedError, match="'e' broke"):
                async for delta in client.stream(request(request_id)):
                    seen += delta.token_ids
            return seen

        assert await asyncio.gather(one("a"), one("b")) == [[5], [5]]
        assert not client.connected


async def test_connects_again(tmp_path):
    """After a lost connection the next request opens a new one."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        engine.send(tokens((await engine.receive()).stream, 7, finish="stop"))

    async with engine_that(tmp_path, script) as client:
        assert await collect(client) == [7]
        await asyncio.wait_for(lost(client), 5)
        assert await collect(client) == [7]


async def test_nobody_there(tmp_path):
    """An address where nothing listens is UnavailableError and not EngineDiedError: nothing was submitted."""
    client = WireEngineClient("e", str(tmp_path / "none"))
    with pytest.raises(UnavailableError, match="cannot be reached: No such file") as info:
        await client.describe()
    assert not isinstance(info.value, EngineDiedError)


@pytest.mark.parametrize("address", ["tcp://nohost", "tcp://:x"])
async def test_bad_address(address):
    """An address that is none is refused with the form that it should have."""
    with pytest.raises(InvalidArgumentError, match="tcp://HOST:PORT"):
        await WireEngineClient("e", address).connect()


async def test_refusal_is_typed(tmp_path):
    """What the engine says when it refuses a connection is what the caller gets."""

    async def script(engine: Engine) -> None:
        hello = await engine.receive()
        assert hello.token == "t"
        engine.send(wire.Failure(error=ProtocolVersionError("speaks 2").to_wire()))

    async with engine_that(tmp_path, script, token="t") as client:
        with pytest.raises(ProtocolVersionError, match="speaks 2"):
            await client.connect()


async def test_no_welcome(tmp_path):
    """An engine that accepts and says nothing is unavailable after the timeout."""

    async def script(engine: Engine) -> None:
        await engine.receive()
        await asyncio.sleep(60)

    async with engine_that(tmp_path, script, timeouts=WireTimeouts(connect=0.05)) as client:
        with pytest.raises(UnavailableError, match=r"did not say welcome within 0\.05 s"):
            await client.connect()


async def test_silence_is_death(tmp_path):
    """An engine whose heartbeats stop (a half-open connection, a stopped process) counts as dead after the silence limit."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        engine.send(tokens((await engine.receive()).stream, 1))
        await asyncio.sleep(60)

    async with engine_that(tmp_path, script, timeouts=WireTimeouts(silence=0.1)) as client:
        with pytest.raises(EngineDiedError, match=r"silent for 0\.1 s"):
            await collect(client)


async def test_heartbeats_break_the_silence(tmp_path):
    """A slow engine that beats is not dead, and its last status is kept."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        stream = (await engine.receive()).stream
        for k in range(12):
            engine.send(wire.Heartbeat(status=EngineStatus(engine_id="e", steps=k)))
            await asyncio.sleep(0.05)
        engine.send(tokens(stream, 1, finish="stop"))
        await engine.receive()

    async with engine_that(tmp_path, script, timeouts=WireTimeouts(silence=0.3)) as client:
        assert await collect(client) == [1]
        assert client.last_status.steps == 11


async def test_closing_a_stream_aborts_it(tmp_path):
    """Closing the generator sends an abort for its number; what still comes for it is ignored."""
    aborted = asyncio.get_running_loop().create_future()

    async def script(engine: Engine) -> None:
        await engine.welcome()
        stream = (await engine.receive()).stream
        engine.send(tokens(stream, 1))
        message = await engine.receive()
        engine.send(tokens(stream, 2))
        aborted.set_result((message, stream))
        second = (await engine.receive()).stream
        engine.send(tokens(second, 3, finish="stop"))
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        stream = client.stream(request())
        assert (await anext(stream)).token_ids == (1,)
        await stream.aclose()
        message, number = await aborted
        assert message == wire.Abort(stream=number)
        assert await collect(client) == [3]


async def test_stream_failure_is_raised(tmp_path):
    """A failure of one stream is raised as its own error and no abort is sent for it."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        stream = (await engine.receive()).stream
        engine.send(wire.Failure(error=ResourceExhaustedError("full", retry_after_s=3.0).to_wire(), stream=stream))
        assert isinstance(await engine.receive(), wire.Call)

    async with engine_that(tmp_path, script) as client:
        with pytest.raises(ResourceExhaustedError, match="full") as info:
            await collect(client)
        assert info.value.retry_after_s == 3.0
        with pytest.raises(EngineDiedError):
            await client.status()


async def test_slow_consumer(tmp_path):
    """A consumer that does not read gets its stream aborted at the bound, and the other streams go on."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        slow, fast = await engine.receive(), await engine.receive()
        engine.send(*[tokens(slow.stream, 1) for _ in range(11)])
        engine.send(tokens(fast.stream, 2, finish="stop"))
        assert await engine.receive() == wire.Abort(stream=slow.stream)
        await engine.receive()

    async with engine_that(tmp_path, script, max_buffered_tokens=10) as client:
        slow = client.stream(request("slow"))
        first = asyncio.ensure_future(anext(slow))
        await asyncio.sleep(0)
        assert await collect(client, "fast") == [2]
        assert len((await first).token_ids) == 11
        with pytest.raises(ResourceExhaustedError, match="'slow' is not read"):
            await anext(slow)


class Sink:
    """Notes what it is told; fails at `bad`, if that comes."""

    def __init__(self, bad: int | None = None) -> None:
        self.seen: list[int] = []
        self.over: asyncio.Future[SageError | None] = asyncio.get_running_loop().create_future()
        self._bad = bad

    def delta(self, delta: TokenDelta) -> None:
        self.seen.extend(delta.token_ids)
        if self._bad in delta.token_ids:
            raise KeyError(self._bad)
        if delta.finish_reason is not None:
            self.over.set_result(None)

    def ended(self, error: SageError | None) -> None:
        self.over.set_result(error)


async def test_pushes_deltas(tmp_path):
    """A sink gets the deltas of its run, also of the one for which the client has to connect first."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        for number in range(2):
            stream = (await engine.receive()).stream
            engine.send(tokens(stream, number, 7), tokens(stream, 8, finish="stop"), tokens(stream, 9))
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        for number in range(2):
            sink = Sink()
            client.push(request(), sink)
            await sink.over
            assert sink.seen == [number, 7, 8]


async def test_cancelled_push_aborts(tmp_path):
    """Cancelling a run sends one abort for its number; a run that has finished sends none, and nobody is told anything more."""
    aborted = asyncio.get_running_loop().create_future()

    async def script(engine: Engine) -> None:
        await engine.welcome()
        first, second = await engine.receive(), await engine.receive()
        engine.send(tokens(second.stream, 5, finish="stop"))
        message = await engine.receive()
        engine.send(tokens(first.stream, 6))
        aborted.set_result((message, first.stream))
        assert isinstance(await engine.receive(), wire.Goodbye)

    async with engine_that(tmp_path, script) as client:
        await client.connect()
        first, second = Sink(), Sink()
        run, finished = client.push(request("first"), first), client.push(request("second"), second)
        await second.over
        finished.cancel()
        run.cancel()
        run.cancel()
        message, number = await aborted
        assert message == wire.Abort(stream=number)
        await client.close()
        assert first.seen == []
        assert not first.over.done()


async def test_push_is_told_of_failures(tmp_path):
    """A refused run, one on an engine that ends, and one that no frame holds end with their errors."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        refused = (await engine.receive()).stream
        engine.send(wire.Failure(error=ResourceExhaustedError("full").to_wire(), stream=refused))
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        await client.connect()
        refused, broken, large = Sink(), Sink(), Sink()
        client.push(request(), refused)
        assert isinstance(await refused.over, ResourceExhaustedError)
        client.push(msgspec.structs.replace(request(), prompt_token_ids=(1 << 30,) * 2**23), large).cancel()
        assert isinstance(await large.over, InvalidArgumentError)
        client.push(request(), broken)
        assert isinstance(await broken.over, EngineDiedError)


async def test_a_finished_run_leaves_no_cycle(tmp_path):
    """A sink that holds its run is gone when the run ends and is let go of, without the garbage collector."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        stream = (await engine.receive()).stream
        engine.send(tokens(stream, 1, finish="stop"))
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        await client.connect()
        sink = Sink()
        sink.run, over, gone = client.push(request(), sink), sink.over, weakref.ref(sink)
        gc.disable()
        try:
            await over
            del sink
            assert gone() is None
        finally:
            gc.enable()


async def test_failing_sink_is_alone(tmp_path, caplog):
    """A sink with a bug loses its own stream, which is aborted; the others of the frame get their tokens."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        bad, good = await engine.receive(), await engine.receive()
        both = tokens(bad.stream, 1).deltas + tokens(good.stream, 2, finish="stop").deltas
        engine.send(wire.Deltas(deltas=both))
        assert await engine.receive() == wire.Abort(stream=bad.stream)
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        await client.connect()
        bad, good = Sink(bad=1), Sink()
        client.push(request("bad"), bad)
        client.push(request("good"), good)
        assert await good.over is None
        assert isinstance(await bad.over, InternalError)
        assert client.connected
    assert "its reader failed" in caplog.text


async def test_calls(tmp_path):
    """Answers find their calls in whatever order they come; a method that was not offered is refused without asking."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        calls = {m.method: m for m in [await engine.receive(), await engine.receive()]}
        engine.send(wire.reply(calls["abort"].call_id, True))
        engine.send(wire.reply(calls["status"].call_id, EngineStatus(engine_id="e", steps=3)))
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        status, found = await asyncio.gather(client.status(), client.abort("x"))
        assert (status.steps, found) == (3, True)
        with pytest.raises(UnsupportedError, match="does not offer 'drain'"):
            await client.drain(1.0)


async def test_embedding_and_its_cancellation(tmp_path):
    """Vectors come back as bytes; giving up on them tells the engine to stop."""
    cancelled = asyncio.get_running_loop().create_future()

    async def script(engine: Engine) -> None:
        await engine.welcome(("embed",))
        first = await engine.receive()
        assert wire.decode_params(first) == EmbedRequest(request_id="v", inputs=((1, 2),))
        engine.send(wire.reply(first.call_id, EmbedResult(request_id="v", width=1, data=b"\0\0\x80?", prompt_tokens=2)))
        second = await engine.receive()
        cancelled.set_result(await engine.receive() == wire.Cancel(call_id=second.call_id))
        await engine.receive()

    async with engine_that(tmp_path, script) as client:
        assert (await client.embed(EmbedRequest(request_id="v", inputs=((1, 2),)))).vectors() == [[1.0]]
        with pytest.raises(DeadlineExceededError, match=r"'embed' within 0\.05 s"):
            await client.embed(EmbedRequest(request_id="w", inputs=((1,),), deadline_s=0.05))
        assert await cancelled


async def test_call_without_answer(tmp_path):
    """A call that is not answered in time raises, with the method and the time."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        await engine.receive()
        await asyncio.sleep(60)

    async with engine_that(tmp_path, script, timeouts=WireTimeouts(call=0.05)) as client:
        with pytest.raises(DeadlineExceededError, match=r"'status' within 0\.05 s"):
            await client.status()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1"], ids=["huge", "malformed"])
async def test_engine_that_sends_garbage(tmp_path, garbage):
    """Bytes that are no message end the connection and every stream on it."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        await engine.receive()
        engine.send(garbage)
        await asyncio.sleep(60)

    async with engine_that(tmp_path, script) as client:
        with pytest.raises(EngineDiedError, match="cannot be understood"):
            await collect(client)


async def test_goodbye_has_its_reason(tmp_path):
    """An engine that leaves on purpose is reported with its own words."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        await engine.receive()
        engine.send(wire.Goodbye(reason="the engine is shutting down"))

    async with engine_that(tmp_path, script) as client:
        with pytest.raises(EngineDiedError, match="the engine is shutting down"):
            await collect(client)


async def test_closed_client(tmp_path):
    """A closed client ends its streams, says goodbye, and takes no more work; closing twice is fine."""
    farewell = asyncio.get_running_loop().create_future()

    async def script(engine: Engine) -> None:
        await engine.welcome()
        await engine.receive()
        farewell.set_result(await engine.receive())

    async with engine_that(tmp_path, script) as client:
        pending = asyncio.ensure_future(collect(client))
        await client.connect()
        await asyncio.sleep(0.01)
        await client.close()
        await client.close()
        with pytest.raises(EngineDiedError, match="was closed"):
            await pending
        assert isinstance(await farewell, wire.Goodbye)
        with pytest.raises(UnavailableError, match="is closed"):
            await client.status()


async def test_unnamed_engine_gets_its_name(tmp_path):
    """A client that did not mind whom it reached takes the engine's own name."""

    async def script(engine: Engine) -> None:
        await engine.welcome()
        await engine.receive()

    async with engine_that(tmp_path, script, engine_id="") as client:
        assert (await client.describe()).vocab_size == 10
        assert client.engine_id == "e"
