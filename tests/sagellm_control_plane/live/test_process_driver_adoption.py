"""Engines that a driver finds running: orphans of one that was killed, and those begun before the event loop."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import counting_processes
import msgspec
import pytest
from counting_processes import Listener, alive, argv, spec, tokens

from sagellm_control_plane.live.lifecycle import RestartPolicy
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions, ProcessState
from sagellm_control_plane.live.processes import AdoptedProcess, identity, is_alive, own_identity
from sagellm_control_plane.live.store import ProcessRecord, Store
from sagellm_protocol.errors import ModelFileError

GATEWAY = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from counting_processes import Listener, argv, spec
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_control_plane.live.store import Store
async def main():
    store = Store(Path(sys.argv[4])) if len(sys.argv) > 4 else None
    driver = ProcessDriver(argv, ProcessOptions(run_dir=Path(sys.argv[2]), log_dir=Path(sys.argv[3]), orphan_grace_s=5), store=store)
    listener = Listener()
    await driver.start_engine(spec(), listener)
    print(listener.ready.get_nowait()[2], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@contextlib.contextmanager
def gateway(options: ProcessOptions, *store: Path):
    """A process with a driver and one engine; killed by SIGKILL at the end. Yields it and the engine's pid."""
    here = str(Path(counting_processes.__file__).parent)
    command = [sys.executable, "-c", GATEWAY, here, options.run_dir, options.log_dir, *store]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        try:
            yield parent, int(parent.stdout.readline())
        finally:
            parent.kill()


async def ended(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    await AdoptedProcess(pid, identity(pid)).wait(20)


async def test_a_process_that_ended_before_it_was_adopted_has_ended():
    """Waiting for a process that is gone already, and so has no identity, returns at once."""
    gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await gone.wait()
    await ended(gone.pid)


async def test_engines_end_with_their_driver(options):
    """When the process with a driver without a store is killed by SIGKILL its engines end too."""
    with gateway(options) as (_, pid):
        assert alive(pid)
    await ended(pid)


async def test_orphans_are_adopted(options, tmp_path):
    """After kill -9 of the gateway the next one finds its engine, serves by it, restarts it when it dies, and stops it."""
    with gateway(options, tmp_path / "db") as (_, pid):
        pass
    assert alive(pid)
    store = Store(tmp_path / "db")
    driver, listener = ProcessDriver(argv, options, store=store), Listener()
    assert [s.engine_id for s in await driver.adopt(listener)] == ["e"]
    engine_id, client, announced = listener.ready.get_nowait()
    assert (engine_id, announced, driver.processes()[0].state) == ("e", pid, ProcessState.READY)
    assert len(await tokens(client)) == 5
    assert store.processes()[0].owner == own_identity()
    assert "building the engine" in driver.logs("e")[0]
    os.kill(pid, signal.SIGKILL)
    event = await listener.exits.get()
    assert (event.pid, event.returncode) == (pid, None)
    _, fresh, new_pid = await listener.ready.get()
    assert len(await tokens(fresh)) == 5
    await driver.close()
    assert not alive(new_pid)
    assert store.processes() == []
    store.close()


async def test_engines_of_a_living_gateway_are_left_alone(options, tmp_path):
    """A second gateway on the same store does not touch the engines of the first, and cannot reserve what they hold."""
    with gateway(options, tmp_path / "db") as (_, pid):
        store = Store(tmp_path / "db")
        driver = ProcessDriver(argv, options, store=store)
        assert await driver.adopt(Listener()) == []
        await driver.close()
        assert alive(pid)
    assert [s.engine_id for s in await driver.adopt(Listener())] == ["e"]
    await driver.close()
    await ended(pid)
    store.close()


async def test_orphan_that_nobody_adopts(options, tmp_path):
    """An engine whose gateway was killed ends by itself when nobody takes it over within the grace time."""
    quick = msgspec.structs.replace(options, orphan_grace_s=0.2)
    store = Store(tmp_path / "db")
    driver, listener = ProcessDriver(argv, quick, store=store), Listener()
    client = await driver.start_engine(spec(), listener)
    (engine,) = driver._engines.values()
    engine.supervisor.cancel()
    os.close(engine.parent_fd)  # as the kernel does when the gateway is killed
    engine.parent_fd = None
    await client.close()
    assert await engine.child.wait(20) == 0
    await driver.close()
    store.close()


async def test_orphan_that_does_not_answer_is_ended(options, tmp_path, monkeypatch):
    """An orphan that is stuck is killed instead of adopted, and what it held is free again."""
    monkeypatch.setattr("sagellm_control_plane.live.process_driver._ADOPT_WAIT_S", 0.3)
    with gateway(options, tmp_path / "db") as (_, pid):
        os.kill(pid, signal.SIGSTOP)
    store = Store(tmp_path / "db")
    store.reserve("gpu", "e", ["0"])
    driver = ProcessDriver(argv, options, store=store)
    assert await driver.adopt(Listener()) == []
    assert not alive(pid)
    assert (store.processes(), store.reservations()) == ([], [])
    await driver.close()
    store.close()


async def test_dead_orphan_is_forgotten(options, tmp_path):
    """A recorded process that is gone, or whose number belongs to somebody else now, is forgotten and never signalled."""
    with gateway(options, tmp_path / "db") as (_, pid):
        os.kill(pid, signal.SIGKILL)
        await ended(pid)
    store = Store(tmp_path / "db")
    stale = store.processes() or [
        ProcessRecord(engine_id="e", pid=0, identity="", address="", token="", started_at=0, owner="", spec=spec())
    ]
    store.put_process(msgspec.structs.replace(stale[0], pid=os.getpid(), identity=f"boot:{os.getpid()}:1", owner="x"))
    driver = ProcessDriver(argv, options, store=store)
    assert await driver.adopt(Listener()) == []
    assert store.processes() == []
    await driver.close()
    store.close()


def test_identity_of_processes():
    """A process has one identity while it lives, and none afterwards."""
    process = subprocess.Popen(["sleep", "60"])
    mine = identity(process.pid)
    assert mine == identity(process.pid)
    assert is_alive(mine)
    process.kill()
    process.wait()
    assert identity(process.pid) == ""
    assert not is_alive(mine)
    assert not is_alive("")


async def test_an_engine_that_was_begun_is_the_one_that_starts(options, store):
    """What was begun before the event loop is taken by the start with the same configuration: one process, noted once."""
    driver = ProcessDriver(argv, options, store=store)
    driver.begin(spec())
    (record,) = store.processes()
    listener = Listener()
    client = await driver.start_engine(msgspec.structs.replace(spec(), restart=RestartPolicy()), listener)
    assert listener.ready.get_nowait()[2] == record.pid
    assert len(await tokens(client)) == 5
    await driver.close()
    assert not alive(record.pid)
    assert store.processes() == []


async def test_an_engine_that_was_begun_otherwise_gives_way(options):
    """A start with another configuration ends what was begun and starts its own."""
    driver = ProcessDriver(argv, options)
    driver.begin(spec(step_s=0.5))
    (begun,) = driver._store.processes()
    listener = Listener()
    await driver.start_engine(spec(), listener)
    assert listener.ready.get_nowait()[2] != begun.pid
    assert not alive(begun.pid)
    await driver.close()


@pytest.mark.parametrize("how", ["drop", "close"])
async def test_an_engine_that_was_begun_in_vain_is_ended(options, store, how):
    """What was begun and never started leaves no process, no note and no socket."""
    driver = ProcessDriver(argv, options, store=store)
    driver.begin(spec())
    (record,) = store.processes()
    if how == "close":
        await driver.close()
    else:
        driver.drop_begun()
    assert not alive(record.pid)
    assert store.processes() == []
    assert list(options.run_dir.iterdir()) == []


async def test_a_begun_engine_that_cannot_load_says_why(options):
    """An engine that ended before it was started reports its own error at the start."""
    driver = ProcessDriver(argv, options)
    driver.begin(spec(bad_model=True))
    with pytest.raises(ModelFileError):
        await driver.start_engine(spec(bad_model=True), Listener())
    await driver.close()


def test_nothing_is_begun_beside_engines_to_adopt(options, store):
    """Where an earlier driver's engines may live on, a start waits for `adopt`."""
    before = ProcessRecord(
        engine_id="e", pid=os.getpid(), identity=own_identity(), address="", token="", started_at=0.0, owner="gone", spec=spec()
    )  # fmt: skip
    store.put_process(before)
    driver = ProcessDriver(argv, options, store=store)
    driver.begin(spec())
    assert [record.pid for record in store.processes()] == [os.getpid()]
    driver.drop_begun()
    assert len(store.processes()) == 1
