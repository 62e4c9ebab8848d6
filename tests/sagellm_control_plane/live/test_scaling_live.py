"""The autoscaler acts: engine processes come with demand and go without it."""

from __future__ import annotations

import asyncio
import sys

import msgspec
import pytest

from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.types import AutoscalerConfig, EngineState
from sagellm_core.config import EngineConfig, Limits, MockOptions
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_protocol.errors import InvalidArgumentError, ModelNotFoundError
from sagellm_protocol.generation import ChoiceDelta, GenerationRequest
from sagellm_protocol.sampling import SamplingParams


class Catalog:
    def models(self):
        return ["one", "two"]

    def engine_spec(self, model_id, engine_id, options):
        config = EngineConfig(
            model="mock",
            model_id=model_id,
            engine_id=engine_id,
            limits=Limits(parallel=2, n_ctx=512),
            mock=MockOptions(base_ms=10.0),
        )
        return EngineSpec(engine_id=engine_id, model_id=model_id, config=msgspec.to_builtins(config))

    def chat_model(self, model_id):
        return ByteChatModel(model_id, 512)


def argv(spec, socket):
    config = msgspec.json.encode(spec.config).decode()
    return [sys.executable, "-m", "sagellm_core.server", "--config", config, "--socket", socket, "--heartbeat", "0.2"]


async def tokens_of(manager, request_id, model, tokens=20):
    sampling = SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True)
    request = GenerationRequest(request_id=request_id, model=model, prompt="hello", sampling=sampling)
    return sum([len(e.token_ids) async for e in manager.generate(request) if isinstance(e, ChoiceDelta)])


async def test_engines_follow_demand_from_zero_and_back(tmp_path):
    """A model nobody serves is started when asked for, gets a second engine under load, and goes when it is idle."""
    manager = ControlPlaneManager(
        driver=ProcessDriver(argv, ProcessOptions(run_dir=tmp_path / "r", log_dir=tmp_path / "l")),
        catalog=Catalog(),
        enable_auto_scaling=True,
        autoscaler_config=AutoscalerConfig(
            min_engines=0,
            max_engines=2,
            interval_s=0.1,
            up_stable_s=0.2,
            down_stable_s=0.3,
            idle_s=0.5,
            cold_start_s=1.0,
        ),
        seed=1,
    )
    await manager.start()
    try:
        with pytest.raises(ModelNotFoundError):
            await tokens_of(manager, "x", "three")
        assert await tokens_of(manager, "a", "one") == 20
        assert len(manager.list_engines()) == 1
        load = [asyncio.create_task(tokens_of(manager, f"l{i}", "one", 120)) for i in range(10)]
        while len(manager.list_engines(EngineState.READY)) < 2:  # noqa: ASYNC110 - pytest's timeout bounds the wait
            await asyncio.sleep(0.02)
        assert await asyncio.gather(*load) == [120] * 10
        while manager.list_engines():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        status = manager.get_autoscaler_status()
        assert status["starts"] >= 1
        assert status["stops"] >= 2
        assert await tokens_of(manager, "b", "one") == 20
    finally:
        await manager.stop()


async def test_models_take_turns_in_the_memory_that_there_is(tmp_path):
    """With room for one engine, the idle model leaves when another is asked for, and a busy one is waited for, not stopped."""
    driver = ProcessDriver(argv, ProcessOptions(run_dir=tmp_path / "r", log_dir=tmp_path / "l"))
    # A mock engine takes about 50 MiB: there is room for one and not for two.
    limits = AutoscalerConfig(min_engines=0, max_engines=1, interval_s=0.1, idle_s=600.0, memory_limit_bytes=80 << 20)
    manager = ControlPlaneManager(
        driver=driver, catalog=Catalog(), enable_auto_scaling=True, autoscaler_config=limits, seed=1
    )
    await manager.start()
    try:
        assert await tokens_of(manager, "a", "one") == 20
        (engine,) = manager._dispatcher.registry.all()
        while engine.status is None or not engine.status.rss_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert 40 << 20 < engine.status.rss_bytes < 80 << 20
        assert await tokens_of(manager, "b", "two") == 20
        assert [e.model_id for e in manager.list_engines()] == ["two"]
        long = asyncio.create_task(tokens_of(manager, "c", "two", 150))
        while not manager.get_metrics().active_requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        back = asyncio.create_task(tokens_of(manager, "d", "one"))
        await asyncio.wait((long, back), return_when=asyncio.FIRST_COMPLETED)
        assert long.done()
        assert long.result() == 150
        assert await back == 20
        assert [e.model_id for e in manager.list_engines()] == ["one"]
    finally:
        await manager.stop()


def test_autoscaling_without_a_driver_is_refused():
    """An autoscaler that cannot act is an error, not a decoration."""
    with pytest.raises(InvalidArgumentError, match="enable_auto_scaling"):
        ControlPlaneManager(enable_auto_scaling=True)
    with pytest.raises(InvalidArgumentError, match="no effect"):
        ControlPlaneManager(autoscaler_config=AutoscalerConfig())
