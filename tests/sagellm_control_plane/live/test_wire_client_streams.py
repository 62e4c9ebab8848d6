"""Streams and sinks of the wire's client, against scripted peers."""

import asyncio
import gc
import weakref

import msgspec
import pytest
from scripted_engine import Engine, collect, engine_that, request, tokens

from sagellm_protocol import TokenDelta, wire
from sagellm_protocol.errors import (
    EngineDiedError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SageError,
)


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
