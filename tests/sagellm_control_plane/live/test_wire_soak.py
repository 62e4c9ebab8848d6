"""Random load over the wire for a while: nothing is left behind."""

import asyncio
import random
import sys
import time

import msgspec
import pytest

from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_control_plane.live.wire_client import WireEngineClient
from sagellm_protocol import EngineRequest, SamplingParams
from sagellm_protocol.errors import EngineDiedError


class Nobody:
    def engine_ready(self, *_: object) -> None:
        """Not listening."""

    def engine_exited(self, *_: object) -> None:
        """Not listening."""


def argv(spec: EngineSpec, address: str) -> list[str]:
    config = {
        "model": "mock",
        "engine_id": spec.engine_id,
        "mock": {"scale": 0.05},
        "limits": {"n_ctx": 512, "parallel": 8},
    }
    return [
        sys.executable,
        "-m",
        "sagellm_core.server",
        "--config",
        msgspec.json.encode(config).decode(),
        "--socket",
        address,
    ]


async def user(rng: random.Random, client: WireEngineClient, until: float, done: list[int]) -> None:
    """Send requests, read some to the end, give others up at a random token; now and then the connection is cut."""
    k = 0
    while time.monotonic() < until:
        k += 1
        request = EngineRequest(
            request_id=f"{id(client)}-{id(rng)}-{k}",
            prompt_token_ids=tuple(rng.randrange(250) for _ in range(rng.randrange(1, 200))),
            sampling=SamplingParams(seed=k, max_tokens=rng.randrange(1, 200), ignore_eos=True),
        )
        patience = rng.choice([10**9, rng.randrange(1, 100)])
        stream = client.stream(request)
        seen = 0
        try:
            async for delta in stream:
                seen += len(delta.token_ids)
                if seen > patience:
                    break
                if rng.random() < 0.0005:
                    client._connection._transport.abort()
        except EngineDiedError:
            continue  # the cut, ours or a neighbour's
        finally:
            await stream.aclose()
        done.append(seen)


async def soak(tmp_path, seconds: float) -> tuple[int, float]:
    driver = ProcessDriver(argv, ProcessOptions(run_dir=tmp_path / "run", log_dir=tmp_path / "logs"))
    watcher = await driver.start_engine(EngineSpec(engine_id="e", model_id="mock", config={}), Nobody())
    (info,) = driver.processes()
    clients = [WireEngineClient("e", info.address) for _ in range(2)]
    done: list[int] = []
    rng = random.Random(3)

    async def load(until: float) -> None:
        await asyncio.gather(*(user(random.Random(rng.random()), c, until, done) for c in clients for _ in range(8)))

    await load(time.monotonic() + seconds / 4)
    before = (await watcher.status()).rss_bytes
    await load(time.monotonic() + seconds)
    for client in clients:
        await client.close()
    for _ in range(200):
        status = await watcher.status()
        if not status.running + status.waiting:
            break
        await asyncio.sleep(0.01)
    assert (status.running, status.waiting, status.blocks_used) == (0, 0, 0)
    assert status.aborted > 0
    assert status.failed == 0
    await driver.close()
    return len(done), (status.rss_bytes - before) / 2**20


async def test_nothing_is_left_behind(tmp_path):
    """After random requests, abandoned streams and cut connections no sequence and no block is held."""
    requests, _ = await soak(tmp_path, 2.0)
    assert requests > 20


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_memory_does_not_grow(tmp_path):
    """Two minutes of it do not make the engine process grow."""
    requests, grown_mb = await soak(tmp_path, 120.0)
    assert requests > 1000
    assert grown_mb < 10, f"{grown_mb:.1f} MB more after {requests} requests"
