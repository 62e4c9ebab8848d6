"""Unloading an idle engine and loading it again."""

import asyncio
import contextlib

import pytest

from sagellm_core.build import build_engine
from sagellm_core.config import EngineConfig, MockOptions
from sagellm_core.keepalive import KeepAliveEngine
from sagellm_core.local import LocalEngine
from sagellm_protocol import EngineRequest, SamplingParams
from sagellm_protocol.errors import KVTransferError, ModelFileError, UnavailableError
from sagellm_protocol.handover import KVExportRequest


def build() -> LocalEngine:
    return LocalEngine(build_engine(EngineConfig(model="mock", engine_id="k", mock=MockOptions(scale=0))))


def request(request_id: str = "r", max_tokens: int = 40) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(range(40)),
        sampling=SamplingParams(seed=3, max_tokens=max_tokens, ignore_eos=True),
    )


async def tokens(engine: KeepAliveEngine, **kwargs: object) -> list[int]:
    return [t async for delta in engine.stream(request(**kwargs)) for t in delta.token_ids]


@contextlib.asynccontextmanager
async def keeping(keep_alive_s: float, rebuild=build):
    first = build()
    engine = KeepAliveEngine(first, await first.describe(), rebuild, keep_alive_s)
    yield engine
    await engine.close()
    await engine.close()


async def unloaded(engine: KeepAliveEngine) -> None:
    while engine.loaded:  # noqa: ASYNC110 (the timer is what is tested)
        await asyncio.sleep(0.005)


async def test_unload_and_reload():
    """After the idle time the model goes, the next request brings it back, and the tokens and counters go on as before."""
    async with keeping(0.05) as engine:
        before = await tokens(engine)
        steps = (await engine.status()).steps
        await asyncio.wait_for(unloaded(engine), 10)
        asleep = await engine.status()
        assert (asleep.phase, asleep.steps, asleep.blocks_total, asleep.finished) == ("unloaded", steps, 0, 1)
        assert (await engine.describe()).n_blocks > 0
        assert await tokens(engine) == before
        awake = await engine.status()
        assert (awake.phase, awake.finished) == ("ready", 2)
        assert awake.steps > steps
        assert awake.histograms["ttft_s"].sum > asleep.histograms["ttft_s"].sum


async def test_work_keeps_it_awake():
    """A sequence that runs longer than the idle time is not cut."""
    async with keeping(0.01) as engine:
        stream = engine.stream(request())
        await anext(stream)
        await asyncio.sleep(0.05)
        assert engine.loaded
        await stream.aclose()
        await asyncio.wait_for(unloaded(engine), 10)


async def test_requests_that_come_while_it_loads_share_one_load():
    """Any number of requests that meet an unloaded engine cause one load."""
    built = []

    def counting() -> LocalEngine:
        built.append(1)
        return build()

    async with keeping(0.02, counting) as engine:
        await asyncio.wait_for(unloaded(engine), 10)
        results = await asyncio.gather(*(tokens(engine, request_id=f"r{k}") for k in range(5)))
        assert len(built) == 1
        assert all(result == results[0] for result in results)


async def test_failed_reload_fails_its_request_only():
    """When the model cannot be loaded again the request gets the error, and a later one tries anew."""
    broken = True

    def sometimes() -> LocalEngine:
        if broken:
            raise ModelFileError("the file is gone: fetch it again")
        return build()

    async with keeping(0.02, sometimes) as engine:
        await asyncio.wait_for(unloaded(engine), 10)
        with pytest.raises(ModelFileError, match="file is gone"):
            await tokens(engine)
        broken = False
        assert len(await tokens(engine)) == 40


async def test_prefix_index_is_told():
    """An unload is one ``cleared`` event, and the numbers of later events go on above it."""
    async with keeping(0.03) as engine:
        await tokens(engine)
        first = await engine.block_events(0)
        await asyncio.wait_for(unloaded(engine), 10)
        seen = first[-1].seq
        (cleared,) = await engine.block_events(seen)
        assert (cleared.kind, cleared.seq) == ("cleared", seen + 1)
        await tokens(engine)
        again = await engine.block_events(cleared.seq)
        assert [e.block_hash for e in again] == [e.block_hash for e in first]
        assert [e.seq for e in again] == [cleared.seq + e.seq for e in first]
        assert (await engine.block_events(seen))[0] == cleared


async def test_offers_what_the_engine_offers():
    """Methods beyond the port are there exactly if the engine has them, and they load it."""
    async with keeping(0.03) as engine:
        assert hasattr(engine, "block_events")
        assert not hasattr(engine, "fly")
        await asyncio.wait_for(unloaded(engine), 10)
        with pytest.raises(KVTransferError, match="no full block"):
            await engine.export_kv(KVExportRequest(token_ids=tuple(range(32))))
        assert engine.loaded


async def test_adapters_come_back_with_the_model():
    """Adapters that were loaded are loaded again after a reload; one that was unloaded is not."""

    class Adapting(LocalEngine):
        loaded: list[str]

        async def load_adapter(self, name: str, path: str) -> None:
            self.loaded = [*getattr(self, "loaded", []), f"{name}={path}"]

        async def unload_adapter(self, name: str) -> None:
            pass

    def adapting() -> Adapting:
        return Adapting(build_engine(EngineConfig(model="mock", mock=MockOptions(scale=0))))

    first = adapting()
    engine = KeepAliveEngine(first, await first.describe(), adapting, 0.02)
    await engine.load_adapter("a", "/a")
    await engine.load_adapter("b", "/b")
    await engine.unload_adapter("b")
    await asyncio.wait_for(unloaded(engine), 10)
    await tokens(engine)
    assert engine._engine.loaded == ["a=/a"]
    await engine.close()


async def test_closed():
    """A closed engine takes no requests and is not loaded again."""
    async with keeping(10) as engine:
        await engine.close()
        with pytest.raises(UnavailableError):
            await tokens(engine)
        assert not engine.loaded
