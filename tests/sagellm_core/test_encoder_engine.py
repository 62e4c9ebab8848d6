from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from sagellm_backend.encoder import EncodeBatch, EncoderSpec
from sagellm_core.encoder import EncoderSettings, LocalEncoder
from sagellm_protocol.embedding import EmbedRequest
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.ports import EmbeddingClient, EngineClient
from sagellm_protocol.sampling import SamplingParams

SPEC = EncoderSpec(
    architecture="bert",
    n_layers=1,
    d_model=4,
    n_heads=1,
    d_ff=8,
    vocab_size=100,
    context_length=16,
    n_positions=16,
    norm_eps=1e-5,
    pooling="mean",
    normalize=False,
)


class Runner:
    """An encoder whose vector tells what went in: sum of ids, length, first id, rows of the batch; it can be held up."""

    def __init__(self, spec: EncoderSpec = SPEC) -> None:
        self.spec = spec
        self.weight_bytes = 1
        self.batches: list[EncodeBatch] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self.closed = False

    def encode(self, batch: EncodeBatch) -> np.ndarray:
        self.batches.append(batch)
        self.entered.set()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        parts = np.split(batch.token_ids, np.cumsum(batch.lengths)[:-1])
        width = self.spec.n_labels if batch.output == "labels" else 4
        return np.array([[p.sum(), p.size, p[0], 1][:width] for p in parts], np.float32)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
async def encoder(runner: Runner) -> AsyncIterator[LocalEncoder]:
    client = LocalEncoder(runner, EncoderSettings(engine_id="e", model="m", max_rows=10, max_waiting=12))
    yield client
    runner.gate.set()
    await client.close()


def request(*inputs: tuple[int, ...], name: str = "r", **fields: object) -> EmbedRequest:
    return EmbedRequest(request_id=name, inputs=inputs, **fields)


async def held(encoder: LocalEncoder, runner: Runner) -> asyncio.Task[object]:
    """Let the runner stand in a batch, so that what follows queues."""
    runner.gate.clear()
    task = asyncio.create_task(encoder.embed(request((99,), name="held")))
    await asyncio.to_thread(runner.entered.wait, 10)
    return task


async def test_vectors_come_back_in_order(encoder: LocalEncoder, runner: Runner) -> None:
    """Each input gets its own vector, in order, over as many batches as its tokens need."""
    result = await encoder.embed(request((1, 2, 3), (4,), (5,) * 9, (6, 7)))
    assert [v[:3] for v in result.vectors()] == [[6, 3, 1], [4, 1, 4], [45, 9, 5], [13, 2, 6]]
    assert result.prompt_tokens == 15
    assert [b.token_ids.size for b in runner.batches] == [4, 9, 2]


async def test_requests_share_batches(encoder: LocalEncoder, runner: Runner) -> None:
    """Requests that wait together are computed together."""
    first = await held(encoder, runner)
    tasks = [asyncio.create_task(encoder.embed(request((i, i), name=str(i)))) for i in range(1, 5)]
    await asyncio.sleep(0)
    assert (await encoder.status()).waiting == 4
    runner.gate.set()
    results = await asyncio.gather(*tasks, first)
    assert [r.vectors()[0][0] for r in results[:4]] == [2, 4, 6, 8]
    assert [b.lengths.size for b in runner.batches] == [1, 4]


async def test_urgent_requests_go_first(encoder: LocalEncoder, runner: Runner) -> None:
    """A request of a better priority overtakes those that wait."""
    first = await held(encoder, runner)
    late = asyncio.create_task(encoder.embed(request((1,) * 9, name="late", priority=3)))
    await asyncio.sleep(0)
    soon = asyncio.create_task(encoder.embed(request((2,) * 9, name="soon", priority=0)))
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, late, soon)
    assert [int(b.token_ids[0]) for b in runner.batches] == [99, 2, 1]


async def test_dimensions_and_length(encoder: LocalEncoder) -> None:
    """Vectors are cut to `dimensions` and then scaled to length 1 if asked for."""
    (vector,) = (await encoder.embed(request((3, 1), dimensions=2, normalize=True))).vectors()
    assert vector == pytest.approx([4 / np.hypot(4, 2), 2 / np.hypot(4, 2)])
    (vector,) = (await encoder.embed(request((3, 1), dimensions=2))).vectors()
    assert vector == [4, 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": ((100,),)}, InvalidArgumentError, "holds 100"),
        ({"inputs": ((1,) * 17,)}, ContextLengthError, r"17 tokens.*takes 16"),
        ({"dimensions": 5}, InvalidArgumentError, "dimensions is 5.*have 4"),
        ({"task": "classify"}, UnsupportedError, "no classifier"),
        ({"task": "logprobs", "target_ids": (1,)}, UnsupportedError, "no classifier"),
        ({"token_types": ((2,),)}, InvalidArgumentError, "token_types holds 2"),
        ({"adapter": "a"}, UnsupportedError, "adapter"),
        ({"inputs": ((1,),) * 13}, ResourceExhaustedError, "queue holds 12"),
    ],
)
async def test_what_cannot_be_done_is_refused(
    encoder: LocalEncoder, change: dict[str, object], error: type[Exception], message: str
) -> None:
    """A request that the model cannot serve is refused by name, before anything runs."""
    with pytest.raises(error, match=message):
        await encoder.embed(EmbedRequest(**{"request_id": "r", "inputs": ((1,),), **change}))


async def test_classifier() -> None:
    """A model with a classifier gives its logits, and still embeds."""
    runner = Runner(EncoderSpec(**{f: getattr(SPEC, f) for f in SPEC.__struct_fields__} | {"n_labels": 1}))
    encoder = LocalEncoder(runner, EncoderSettings(engine_id="e", model="m"))
    result = await encoder.embed(request((2, 3), task="classify", token_types=((0, 1),)))
    assert result.vectors() == [[5]]
    assert runner.batches[0].output == "labels"
    assert (await encoder.embed(request((2, 3)))).width == 4
    await encoder.close()


async def test_cancelled_request_is_dropped(encoder: LocalEncoder, runner: Runner) -> None:
    """A cancelled request that waits is never computed; abort by id does the same."""
    first = await held(encoder, runner)
    tasks = [asyncio.create_task(encoder.embed(request((i,), name=f"r{i}"))) for i in (1, 2, 3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    assert await encoder.abort("r2")
    assert not await encoder.abort("r2")
    runner.gate.set()
    await asyncio.gather(first, tasks[2])
    assert [int(t) for b in runner.batches for t in b.token_ids] == [99, 3]
    assert (await encoder.status()).aborted == 2
    tasks[1].cancel()


async def test_deadline_passes_in_the_queue(runner: Runner) -> None:
    """A request whose deadline passes while it waits fails with that, and is not computed."""
    now = [0.0]
    encoder = LocalEncoder(runner, EncoderSettings(engine_id="e", model="m"), clock=lambda: now[0])
    first = await held(encoder, runner)
    task = asyncio.create_task(encoder.embed(request((1,), name="late", deadline_s=2.0)))
    await asyncio.sleep(0)
    now[0] = 3.0
    runner.gate.set()
    await first
    with pytest.raises(DeadlineExceededError, match="2 s"):
        await task
    assert len(runner.batches) == 1
    await encoder.close()


async def test_device_failure_fails_its_batch_only(encoder: LocalEncoder, runner: Runner) -> None:
    """A failing batch fails its requests; the next ones are served."""
    runner.error = RuntimeError("boom")
    with pytest.raises(InternalError, match="RuntimeError"):
        await encoder.embed(request((1,), (2,) * 10))
    runner.error = None
    assert (await encoder.embed(request((1,)))).width == 4
    assert (await encoder.status()).failed == 1


async def test_closing_fails_what_waits_and_frees_the_weights(runner: Runner) -> None:
    """Closing ends requests that wait with an error, is idempotent, and closes the runner."""
    encoder = LocalEncoder(runner, EncoderSettings(engine_id="e", model="m"))
    first = await held(encoder, runner)
    waiting = asyncio.create_task(encoder.embed(request((1,), name="w")))
    await asyncio.sleep(0)
    closing = asyncio.create_task(encoder.close())
    await asyncio.sleep(0)
    runner.gate.set()
    await closing
    await first
    with pytest.raises(UnavailableError):
        await waiting
    assert runner.closed
    await encoder.close()
    with pytest.raises(UnavailableError):
        await encoder.status()
    with pytest.raises(UnavailableError):
        await encoder.embed(request((1,)))


async def test_ports(encoder: LocalEncoder) -> None:
    """It is an engine client and an embedding client; it describes itself as an embedding engine and generates nothing."""
    assert isinstance(encoder, EngineClient)
    assert isinstance(encoder, EmbeddingClient)
    described = await encoder.describe()
    assert (described.kind, described.context_length, described.n_blocks) == ("embedding", 16, 0)
    asked = EngineRequest(request_id="g", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1, seed=1))
    with pytest.raises(UnsupportedError, match="embedding model"):
        async for _ in encoder.stream(asked):
            pass


async def test_draining_takes_no_more(encoder: LocalEncoder) -> None:
    """After drain new requests are refused."""
    await encoder.drain()
    with pytest.raises(UnavailableError, match="draining"):
        await encoder.embed(request((1,)))
