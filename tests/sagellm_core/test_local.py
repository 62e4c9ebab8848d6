"""The engine on its own thread: streams, aborts, death and closing, from several loops."""

import asyncio
import gc
import subprocess
import sys
import threading

import pytest

from sagellm_backend.mock import Latency, MockRunner
from sagellm_core.local import LocalEngine
from sagellm_core.testing import mock_engine, run_alone
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import EngineDiedError, ErrorCode, UnavailableError
from sagellm_protocol.ports import EngineClient
from sagellm_protocol.sampling import SamplingParams


def request(name="r", prompt=b"Good morning, ", **sampling):
    how = {"temperature": 0.0, "seed": 1, "max_tokens": 20, "ignore_eos": True, **sampling}
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=SamplingParams(**how))


@pytest.fixture
async def local():
    engine = LocalEngine(mock_engine())
    yield engine
    await engine.close()


async def tokens_of(engine, req):
    return [token async for delta in engine.stream(req) for token in delta.token_ids]


async def settled(engine):
    """Wait until the engine holds nothing."""
    while (status := await engine.status()).running or status.waiting:
        await engine.block_events(0)  # one round trip to the engine's thread
    await engine.check_integrity()
    return await engine.status()


async def test_it_is_an_engine_client(local):
    """LocalEngine satisfies the port."""
    assert isinstance(local, EngineClient)
    assert (await local.describe()).engine_id == local.engine_id == "mock"


async def test_streams_give_what_the_sequences_give_alone(local):
    """Forty streams at once: each has the tokens of its sequence alone, and nothing is held at the end."""
    requests = [request(f"r{i}", b"word " * (i % 7 + 1), temperature=1.0, seed=i) for i in range(40)]
    results = await asyncio.gather(*(tokens_of(local, r) for r in requests))
    assert results == [run_alone(r).token_ids for r in requests]
    assert (await settled(local)).blocks_used == 0


async def test_a_refused_request_is_an_error_delta(local):
    """A failure of one sequence arrives as its last delta."""
    deltas = [delta async for delta in local.stream(request(prompt=b""))]
    assert len(deltas) == 1
    assert deltas[0].finish_reason == "error"
    assert deltas[0].error.code is ErrorCode.INVALID_ARGUMENT


async def test_closing_a_stream_aborts_its_sequence(local):
    """Leaving the loop early frees the blocks."""
    stream = local.stream(request(max_tokens=2000))
    async for _ in stream:
        break
    await stream.aclose()
    assert (await settled(local)).aborted == 1


async def test_cancelling_the_reader_aborts_its_sequence(local):
    """A cancelled task leaves nothing behind."""
    started = asyncio.Event()

    async def read():
        async for _ in local.stream(request(max_tokens=2000)):
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await settled(local)).aborted == 1


async def test_abort_by_id_ends_the_stream_with_cancelled(local):
    """Somebody else may abort; the reader is told."""
    deltas = []
    async for delta in local.stream(request("x", max_tokens=2000)):
        deltas.append(delta)
        if len(deltas) == 1:
            assert await local.abort("x")
    assert deltas[-1].finish_reason == "cancelled"
    assert not await local.abort("x")


async def test_a_slow_reader_gets_joined_deltas():
    """What waits for a reader is bounded by its tokens, not by steps."""
    engine = LocalEngine(mock_engine(latency=Latency(base=0.001)))
    stream = engine.stream(request(max_tokens=200, logprobs=0))
    first = await anext(stream)
    while (await engine.status()).finished == 0:
        await engine.block_events(0)
    await engine.status()  # comes after what the last step said
    rest = [delta async for delta in stream]
    await engine.close()
    assert len(rest) == 1
    assert len(first.token_ids) + len(rest[0].token_ids) == 200
    assert len(rest[0].logprobs) == len(rest[0].token_ids)
    assert rest[0].finish_reason == "length"


async def test_close_ends_open_streams_and_is_idempotent():
    """A stream that is open when the engine closes raises; so does everything after."""
    engine = LocalEngine(mock_engine(latency=Latency(base=0.001)))
    stream = engine.stream(request(max_tokens=2000))
    await anext(stream)
    await engine.close()
    await engine.close()
    with pytest.raises(UnavailableError):
        async for _ in stream:
            pass
    with pytest.raises(UnavailableError):
        await tokens_of(engine, request("late"))
    with pytest.raises(UnavailableError):
        await engine.status()


async def test_a_dying_device_reaches_every_stream(monkeypatch):
    """No reader waits for ever: those of the failed steps get errors, the others EngineDiedError."""

    def step(runner, batch):
        raise RuntimeError("device lost")

    monkeypatch.setattr(MockRunner, "step", step)
    engine = LocalEngine(mock_engine(max_running=1))

    async def read(name):
        try:
            return [delta.error.code async for delta in engine.stream(request(name))]
        except EngineDiedError:
            return [ErrorCode.ENGINE_DIED]

    codes = await asyncio.gather(*(read(f"r{i}") for i in range(6)))
    assert {code for seen in codes for code in seen} == {ErrorCode.INTERNAL, ErrorCode.ENGINE_DIED}
    with pytest.raises(EngineDiedError):
        await engine.status()
    await engine.close()


async def test_a_dead_loop_does_not_hold_its_sequences(local):
    """When an event loop is closed under its streams, their blocks come back."""

    def elsewhere():
        loop = asyncio.new_event_loop()
        stream = local.stream(request("gone", max_tokens=2000))
        loop.run_until_complete(anext(stream))
        loop.close()
        held.append(stream)

    held = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert (await settled(local)).aborted == 1
    held.clear()
    gc.collect()


async def test_several_loops_share_one_engine(local):
    """Threads with loops of their own stream at the same time."""
    results = {}

    def elsewhere(number):
        req = request(f"t{number}", bytes([65 + number]) * 10)
        results[number] = (asyncio.run(tokens_of(local, req)), run_alone(req).token_ids)

    threads = [threading.Thread(target=elsewhere, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    await tokens_of(local, request("here"))
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    assert len(results) == 4
    assert all(got == want for got, want in results.values())


async def test_draining_refuses_new_sequences(local):
    """Draining is passed on to the engine."""
    await local.drain()
    deltas = [delta async for delta in local.stream(request())]
    assert deltas[0].error.code is ErrorCode.UNAVAILABLE
    assert (await local.status()).draining


async def test_one_wake_up_a_step(local, monkeypatch):
    """However many streams a loop has, a step wakes it once."""
    loop = asyncio.get_running_loop()
    calls = []
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args, **how: (calls.append(1), original(*args, **how))[1])
    await asyncio.gather(*(tokens_of(local, request(f"r{i}", max_tokens=40)) for i in range(16)))
    assert len(calls) <= (await local.status()).steps + 5


LEAVE_EARLY = """
import asyncio, sys, threading
from sagellm_core import masks
from sagellm_core.build import build_engine
from sagellm_core.config import EngineConfig, Limits
from sagellm_core.local import LocalEngine
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

masks._HAND_OVER_S = 0.0  # every mask goes to the thread
grammar = GrammarSpec(kind="regex", source="[a-z]*") if sys.argv[2:] else None
engine = LocalEngine(build_engine(EngineConfig(model=sys.argv[1], limits=Limits(n_ctx=1024, parallel=2))))
started = threading.Event()

async def read():
    how = SamplingParams(temperature=0.0, seed=0, max_tokens=1000, ignore_eos=True, grammar=grammar)
    async for _ in engine.stream(EngineRequest(request_id="r", prompt_token_ids=(1, 2, 3), sampling=how)):
        started.set()

def background():
    try:
        asyncio.run(read())
    except Exception as error:
        print(type(error).__name__)

threading.Thread(target=background, daemon=True).start()
started.wait()
print("leaving")
"""


def leave_early(model, *more):
    command = [sys.executable, "-c", LEAVE_EARLY, str(model), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("more", [(), ("grammar",)], ids=["plain", "grammar"])
def test_the_interpreter_may_end_while_a_step_runs(more):
    """Leaving the program without closing the engine ends with 0 and without a word on stderr, also while masks are written."""
    done = leave_early("mock", *more)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("leaving")


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_interpreter_may_end_while_the_native_device_computes(default_model_path):
    """A thread inside native code does not take the process down at exit."""
    done = leave_early(default_model_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_thousand_disconnects_leave_nothing():
    """Readers that leave at random times leave no block and no sequence."""
    engine = LocalEngine(mock_engine(n_blocks=64, n_ctx=256, max_running=8))

    async def visit(number):
        stream = engine.stream(request(f"r{number}", b"a b c " * (number % 9 + 1), max_tokens=60))
        for _ in range(number % 12):
            await anext(stream, None)  # deltas that were joined: it may be over sooner
        await stream.aclose()

    for start in range(0, 2000, 50):
        await asyncio.gather(*(visit(number) for number in range(start, start + 50)))
    assert (await settled(engine)).blocks_used == 0
    await engine.close()
