"""An engine's own thread writes to its clients: the real engine over the simulated device, behind the real server."""

from pathlib import Path

from engine_server import Peer, Served, serving_engine

from sagellm_backend.mock import Latency, MockRunner
from sagellm_core.connection import _frames
from sagellm_core.local import LocalEngine
from sagellm_core.server import EXIT_ENGINE_DIED, EXIT_OK
from sagellm_core.testing import mock_engine, run_alone
from sagellm_protocol import EngineRequest, SamplingParams, TokenDelta, wire
from sagellm_protocol.errors import ErrorCode


def request(name: str = "r", prompt: bytes = b"Good morning, ", max_tokens: int = 20) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


class Client(Peer):
    """A peer that counts the frames with deltas."""

    frames = 0

    async def receive(self) -> object:
        message = await super().receive()
        self.frames += isinstance(message, wire.Deltas)
        return message

    async def last_deltas(self, *streams: int) -> dict[int, tuple[list[int], TokenDelta]]:
        """Read until these streams have finished; return their tokens and last deltas."""
        tokens: dict[int, list[int]] = {number: [] for number in streams}
        last: dict[int, TokenDelta] = {}
        while len(last) < len(streams):
            message = await self.receive()
            assert isinstance(message, wire.Deltas), message
            for number, delta in message.deltas:
                if number in tokens:
                    assert number not in last, "something came after the end"
                    tokens[number].extend(delta.token_ids)
                    if delta.finish_reason is not None:
                        last[number] = delta
        return {number: (tokens[number], last[number]) for number in streams}


class ServedEngine(Served):
    """A server with a `LocalEngine`."""

    async def client(self) -> Client:
        return await self.peer(kind=Client)

    async def settled(self) -> None:
        """Wait until neither the engine nor the server holds a sequence."""
        while self.server._running or (status := await self.engine.status()).running or status.waiting:
            await self.engine.block_events(0)  # one round trip to the engine's thread
        await self.engine.check_integrity()


def serving(tmp_path: Path, **options):
    """The real engine over the simulated device, served; `options` are the engine's."""
    return serving_engine(tmp_path, LocalEngine(mock_engine(**options)), ServedEngine, heartbeat_s=0.02)


async def test_streams_give_what_their_sequences_give_alone(tmp_path):
    """Thirty streams of two clients: each has the tokens of its sequence alone, and at the end nothing is held."""
    requests = {number: request(f"r{number}", b"word " * (number % 7 + 1)) for number in range(30)}
    async with serving(tmp_path) as served:
        clients = [await served.client(), await served.client()]
        for number, each in requests.items():
            clients[number % 2].send(wire.Submit(stream=number, request=each))
        seen = await clients[0].last_deltas(*range(0, 30, 2)) | await clients[1].last_deltas(*range(1, 30, 2))
        assert {n: tokens for n, (tokens, _) in seen.items()} == {
            n: run_alone(r).token_ids for n, r in requests.items()
        }
        await served.settled()


async def test_a_step_is_a_frame(tmp_path):
    """However many streams a client has, it gets one frame a step."""
    async with serving(tmp_path, latency=Latency(base=0.001)) as served:
        client = await served.client()
        client.send(*[wire.Submit(stream=n, request=request(f"r{n}", max_tokens=50)) for n in range(16)])
        await client.last_deltas(*range(16))
        assert client.frames <= (await served.engine.status()).steps


async def test_a_client_that_goes_aborts_its_sequences(tmp_path):
    """When a client vanishes its sequences end within a step, and those of another go on."""
    async with serving(tmp_path, latency=Latency(base=0.001)) as served:
        gone, stays = await served.client(), await served.client()
        gone.send(*[wire.Submit(stream=n, request=request(f"g{n}", max_tokens=1900)) for n in range(3)])
        await gone.receive()
        gone.writer.transport.abort()
        stays.send(wire.Submit(stream=1, request=request("stays")))
        assert (await stays.last_deltas(1))[1][0] == run_alone(request("stays")).token_ids
        await served.settled()
        assert (await served.engine.status()).aborted == 3


async def test_an_id_may_come_again_at_once(tmp_path):
    """A stream under the id of one that was just aborted has all of its own tokens and nothing of the other's end."""
    async with serving(tmp_path, latency=Latency(base=0.001)) as served:
        client = await served.client()
        for number in range(1, 20, 2):
            client.send(wire.Submit(stream=number, request=request(max_tokens=1900)))
            await client.receive()
            client.send(wire.Abort(stream=number), wire.Submit(stream=number + 1, request=request()))
            tokens, last = (await client.last_deltas(number + 1))[number + 1]
            assert (tokens, last.finish_reason) == (run_alone(request()).token_ids, "length")
        await served.settled()


async def test_a_refusal_is_the_last_delta(tmp_path):
    """What the engine refuses ends alone, with its error."""
    async with serving(tmp_path) as served:
        client = await served.client()
        client.send(wire.Submit(stream=1, request=request(prompt=b"")), wire.Submit(stream=2, request=request("ok")))
        seen = await client.last_deltas(1, 2)
        assert seen[1][1].error.code is ErrorCode.INVALID_ARGUMENT
        assert seen[2][0] == run_alone(request("ok")).token_ids
        await served.settled()


async def test_a_client_that_does_not_read_is_cut_off(tmp_path, monkeypatch):
    """One that lets its tokens pile up beyond the bound loses its connection and its sequences, and the engine goes on."""
    monkeypatch.setattr("sagellm_core.connection.MAX_OUTBOUND_BYTES", 1000)
    async with serving(tmp_path) as served:
        lazy, other = await served.client(), await served.client()
        lazy.writer.transport.pause_reading()
        number = 0
        while lazy in served.peers and len(served.server.connections) == 2:
            lazy.send(*[wire.Submit(stream=number + n, request=request(f"l{number + n}")) for n in range(100)])
            number += 100
            await served.engine.block_events(0)
        other.send(wire.Submit(stream=1, request=request("other")))
        assert (await other.last_deltas(1))[1][0] == run_alone(request("other")).token_ids
        lazy.writer.transport.abort()
        await served.settled()


async def test_a_slow_reader_loses_nothing(tmp_path):
    """What a socket does not take at once comes later, whole and in order, also when the server says goodbye meanwhile."""
    async with serving(tmp_path, max_waiting=10_000) as served:
        client = await served.client()
        client.writer.transport.pause_reading()
        client.send(*[wire.Submit(stream=n, request=request(f"r{n}", max_tokens=100)) for n in range(300)])
        (connection,) = served.server.connections
        while not connection._writer.backlog:
            await served.engine.block_events(0)
        await served.settled()
        served.server._finish(EXIT_OK)
        client.writer.transport.resume_reading()
        want = run_alone(request(max_tokens=100)).token_ids
        assert all(tokens == want for tokens, _ in (await client.last_deltas(*range(300))).values())
        assert isinstance(await client.receive(), wire.Goodbye)


async def test_death_of_the_engine_is_told(tmp_path, monkeypatch):
    """When the device fails for good, every stream gets an error, of the engine's death where it did not fail itself, or of the end."""

    def step(runner, batch):
        raise RuntimeError("device lost")

    monkeypatch.setattr(MockRunner, "step", step)
    async with serving(tmp_path, max_running=1) as served:
        client = await served.client()
        client.send(*[wire.Submit(stream=n, request=request(f"r{n}")) for n in range(6)])
        codes = {}
        while len(codes) < 6:
            message = await client.receive()
            if isinstance(message, wire.Failure):
                codes[message.stream] = message.error.code
            else:
                codes |= {number: delta.error.code for number, delta in message.deltas}
        assert {ErrorCode.INTERNAL, ErrorCode.ENGINE_DIED} <= set(codes.values())
        assert set(codes.values()) <= {ErrorCode.INTERNAL, ErrorCode.ENGINE_DIED, ErrorCode.UNAVAILABLE}
        assert await served.task == EXIT_ENGINE_DIED


def test_what_no_frame_holds_fails_alone(monkeypatch):
    """Deltas that are too large for one frame are split; one that is too large by itself is a failure of its stream."""
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 400)
    small, large = TokenDelta(request_id="s", token_ids=(1,) * 200), TokenDelta(request_id="l", token_ids=(1,) * 500)
    frames = wire.FrameDecoder().feed(_frames([(1, small), (2, large), (3, small)]))
    first, second, third = map(wire.decode_from_engine, frames)
    assert (first.deltas, third.deltas) == (((1, small),), ((3, small),))
    assert (second.stream, second.error.code) == (2, ErrorCode.INVALID_ARGUMENT)
    assert wire.FrameDecoder().feed(_frames([(1, small)])) == frames[:1]
