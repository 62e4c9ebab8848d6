"""The client's end of the wire, against scripted peers; the real engine process is in test_process_driver."""

import asyncio

import pytest
from scripted_engine import Engine, collect, engine_that, request, tokens

from sagellm_control_plane.live.wire_client import WireEngineClient, WireTimeouts
from sagellm_protocol import EngineStatus, wire
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.errors import (
    DeadlineExceededError,
    EngineDiedError,
    InvalidArgumentError,
    ProtocolVersionError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.ports import EngineClient


async def lost(client: WireEngineClient) -> None:
    """Wait until the end of file has arrived."""
    while client.connected:  # noqa: ASYNC110 (there is no event: the next request finds out)
        await asyncio.sleep(0)


def test_is_an_engine_client():
    """It has the port's methods."""
    assert isinstance(WireEngineClient("e", "/nowhere"), EngineClient)


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
