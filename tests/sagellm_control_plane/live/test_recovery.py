"""A control plane is killed; the next one on the same store goes on with the same engines."""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.compose import StoreCatalog, engine_argv, engine_config
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_control_plane.live.processes import AdoptedProcess, identity
from sagellm_control_plane.live.store import Store
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.types import EngineState
from sagellm_protocol import GenerationRequest, SamplingParams
from sagellm_protocol.errors import InvalidArgumentError


def make(root: Path) -> tuple[ControlPlaneManager, Store]:
    """A control plane for the mock model, with everything that survives below `root`."""
    store = Store(root / "db")
    options = ProcessOptions(run_dir=root / "run", log_dir=root / "logs", orphan_grace_s=30)
    catalog = StoreCatalog([engine_config("mock", {"mock": {"scale": 0.1}})])
    driver = ProcessDriver(engine_argv, options, store=store)
    return ControlPlaneManager(driver=driver, catalog=catalog, store=store), store


FIRST = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from test_recovery import *
async def main():
    manager, _ = make(Path(sys.argv[2]))
    await manager.start()
    info = await manager.request_engine_startup("mock", "m-1")
    manager.register_engine("far", "other", "127.0.0.1", 9, metadata={"zone": "b"})
    print(info.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@contextlib.contextmanager
def killed_control_plane(root: Path):
    """Run a control plane with one engine of its own and one by address, and kill it; yields the engine's pid."""
    command = [sys.executable, "-c", FIRST, str(Path(__file__).parent), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.kill()
    yield pid


async def text(manager: ControlPlaneManager) -> str:
    request = GenerationRequest(
        request_id="r", model="mock", prompt="hello", sampling=SamplingParams(seed=1, max_tokens=8, ignore_eos=True)
    )
    return "".join([getattr(event, "text", "") async for event in manager.generate(request)])


async def test_goes_on_with_the_same_engine(tmp_path):
    """After kill -9 the engine is served by the next control plane without a restart, and the registered one is known again."""
    with killed_control_plane(tmp_path) as pid:
        manager, store = make(tmp_path)
        await manager.start()
        info = manager.get_engine_info("m-1")
        assert (info.state, info.pid, info.managed, info.restarts) == (EngineState.READY, pid, True, 0)
        assert manager.get_engine_info("far").metadata == {"zone": "b"}
        assert await text(manager)
        again = await manager.request_engine_startup("mock", "m-1")
        assert again.pid == pid
        with pytest.raises(InvalidArgumentError, match="registered already"):
            await manager.request_engine_startup("mock", "m-1")
        assert manager.engine_logs("m-1")
        await manager.stop()
        assert identity(pid) == ""
        assert [record.engine_id for record in store.engines()] == ["far"]
        store.close()


async def test_engine_that_died_too_is_started_again(tmp_path):
    """When the engine was killed with its control plane, the next one starts it anew."""
    with killed_control_plane(tmp_path) as pid:
        engine = AdoptedProcess(pid, identity(pid))
        engine.kill()
        await engine.wait(20)
        manager, store = make(tmp_path)
        await manager.start()
        info = manager.get_engine_info("m-1")
        assert info.state is EngineState.READY
        assert info.pid != pid
        assert await text(manager)
        await manager.stop()
        store.close()


async def test_changed_wish(tmp_path):
    """An engine that is wanted with other options than it was found with is replaced."""
    with killed_control_plane(tmp_path) as pid:
        manager, store = make(tmp_path)
        await manager.start()
        info = await manager.request_engine_startup("mock", "m-1", {"limits": {"parallel": 2}})
        assert info.pid != pid
        assert identity(pid) == ""
        assert await text(manager)
        await manager.stop()
        store.close()


async def test_unknown_model_is_not_adopted(tmp_path):
    """An orphan whose model the new control plane does not know is ended, and what it cannot bring back is struck out."""
    with killed_control_plane(tmp_path) as pid:
        manager, store = make(tmp_path)
        manager._engines._catalog = StoreCatalog([])
        await manager.start()
        assert [info.engine_id for info in manager.list_engines()] == ["far"]
        assert identity(pid) == ""
        assert [record.engine_id for record in store.engines()] == ["far"]
        await manager.stop()
        store.close()


async def test_stopped_engines_stay_stopped(tmp_path):
    """What was stopped or unregistered before the crash does not come back."""
    manager, store = make(tmp_path)
    await manager.start()
    await manager.request_engine_startup("mock", "m-1")
    manager.register_engine("far", "other", "127.0.0.1", 9)
    await manager.request_engine_shutdown("m-1")
    manager.unregister_engine("far")
    assert store.engines() == []
    await manager.stop()
    store.close()
    await asyncio.sleep(0)
