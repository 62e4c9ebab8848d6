"""Prefill and decode on two real engine processes, paired by the control plane."""

import asyncio
import contextlib
import os
import signal

import pytest

from sagellm.compose import StoreCatalog, engine_argv, engine_config
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.types import PDSeparationConfig
from sagellm_protocol import GenerationRequest, SamplingParams
from sagellm_protocol.errors import InvalidArgumentError

PD = PDSeparationConfig(min_prompt_tokens=64, kv_bytes_per_token=4, transfer_bytes_per_s=1e9)
ROLES = {"a": "prefill", "b": "decode"}
LONG = "".join(chr(97 + (k * 7) % 26) for k in range(600))


@contextlib.asynccontextmanager
async def control_plane(tmp_path, **options):
    """Two mock engines: ``a`` is set apart for prefill, ``b`` for decode."""
    driver = ProcessDriver(engine_argv, ProcessOptions(run_dir=tmp_path / "run", log_dir=tmp_path / "logs"))
    catalog = StoreCatalog([engine_config("mock", {"mock": {"scale": 0.3}})])
    manager = ControlPlaneManager(driver=driver, catalog=catalog, seed=1, **options)
    await manager.start()
    starts = (manager.request_engine_startup("mock", name, {"role": role}) for name, role in ROLES.items())
    infos = await asyncio.gather(*starts)
    assert {info.engine_id: info.metadata["role"] for info in infos} == ROLES
    yield manager
    await manager.stop()


async def text(manager: ControlPlaneManager, name: str, prompt: str, max_tokens: int) -> str:
    sampling = SamplingParams(seed=5, max_tokens=max_tokens, ignore_eos=True)
    request = GenerationRequest(request_id=name, model="mock", prompt=prompt, sampling=sampling)
    return "".join([getattr(event, "text", "") async for event in manager.generate(request)])


async def busy(manager: ControlPlaneManager, jobs: set[asyncio.Task]) -> None:
    """Let many short prompts decode, so that a long one would hold them up."""
    for k in range(8):
        jobs.add(asyncio.create_task(text(manager, f"short{k}", "hi", 600)))
    while manager._dispatcher.state.stats.ttft.count < 8:  # noqa: ASYNC110 (first tokens have no event of ours)
        await asyncio.sleep(0.01)


async def long_prompts(manager: ControlPlaneManager) -> list[str]:
    return await asyncio.gather(*(text(manager, f"long{k}", LONG + str(k), 20) for k in range(4)))


@pytest.fixture
async def expected(tmp_path):
    """What the same requests say on engines that do everything themselves."""
    async with control_plane(tmp_path / "unsplit") as manager:
        return await long_prompts(manager)


async def test_split_requests_say_the_same(tmp_path, expected):
    """With the decoding engine busy, long prompts are split, blocks are handed over, and every text is the unsplit one."""
    async with control_plane(tmp_path / "split", enable_pd_separation=True, pd_config=PD) as manager:
        jobs: set[asyncio.Task] = set()
        await busy(manager, jobs)
        assert await long_prompts(manager) == expected
        dispatcher = manager._dispatcher
        assert dispatcher.state.stats.splits > 0
        assert dispatcher.split_stats.transfers > 0
        assert dispatcher.split_stats.fallbacks == 0
        await asyncio.gather(*jobs)
        assert dispatcher.state.ledger.open == 0


async def test_a_role_survives_the_process(tmp_path):
    """An engine that was started for prefill is one for prefill after its process was killed and started again."""
    async with control_plane(tmp_path, enable_pd_separation=True, pd_config=PD) as manager:
        pid = manager.get_engine_info("a").pid
        os.kill(pid, signal.SIGKILL)
        while manager.get_engine_info("a").pid in (0, pid) or not manager.get_engine_info("a").is_healthy:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert manager.get_engine_info("a").metadata["role"] == "prefill"
        assert manager._dispatcher.state.view.engines["a"].profile.role == "prefill"


async def test_an_unknown_role_is_refused(tmp_path):
    """A role that no engine can have is an error that names those that there are, and nothing is started."""
    async with control_plane(tmp_path) as manager:
        with pytest.raises(InvalidArgumentError, match="any, prefill, decode"):
            await manager.request_engine_startup("mock", "c", {"role": "both"})
        with pytest.raises(InvalidArgumentError, match="any, prefill, decode"):
            manager.register_engine("d", "mock", "127.0.0.1", 9, metadata={"role": "encode"})
        assert [info.engine_id for info in manager.list_engines()] == ["a", "b"]


async def test_death_of_the_prefill_engine_is_not_seen(tmp_path, expected):
    """When the engine that computes prompts is killed, the other one does it all, and every text is the same."""
    async with control_plane(tmp_path / "killed", enable_pd_separation=True, pd_config=PD) as manager:
        jobs: set[asyncio.Task] = set()
        await busy(manager, jobs)
        longs = asyncio.create_task(long_prompts(manager))
        while not manager._dispatcher.state.stats.splits:  # noqa: ASYNC110 (decisions have no event of ours)
            await asyncio.sleep(0.001)
        os.kill(manager.get_engine_info("a").pid, signal.SIGKILL)
        assert await longs == expected
        assert all(len(said) > 0 for said in await asyncio.gather(*jobs))
        assert manager._dispatcher.state.ledger.open == 0
