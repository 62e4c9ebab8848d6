"""The driver over real processes: `counting_engine.py` in place of a model, and the mock engine where it matters."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sagellm_control_plane.live.engine_log import EngineLog
from sagellm_control_plane.live.lifecycle import EngineExit, EngineSpec, RestartPolicy
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions, ProcessState
from sagellm_control_plane.live.processes import AdoptedProcess, identity, is_alive, make_private, own_identity
from sagellm_control_plane.live.store import ProcessRecord, Store
from sagellm_control_plane.live.wire_client import WireEngineClient
from sagellm_protocol import EngineRequest, SamplingParams
from sagellm_protocol.errors import (
    EngineDiedError,
    InvalidArgumentError,
    KVTransferError,
    ModelFileError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from sagellm_protocol.handover import KVExportRequest
from sagellm_protocol.ports import EngineClient, KVTransferClient

COUNTING = Path(__file__).parents[2] / "sagellm_core" / "counting_engine.py"
FAST = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05, max_attempts=3)


def argv(spec: EngineSpec, socket: str) -> list[str]:
    config = msgspec.json.encode(dict(spec.config) | {"engine_id": spec.engine_id}).decode()
    where = ["--tcp", socket.removeprefix("tcp://")] if socket.startswith("tcp://") else ["--socket", socket]
    return [sys.executable, str(COUNTING), "--config", config, *where, "--heartbeat", "0.2"]


def spec(engine_id: str = "e", **config: object) -> EngineSpec:
    return EngineSpec(engine_id=engine_id, model_id="count", config=config, ready_timeout_s=30, restart=FAST)


def request(last: int = 100, max_tokens: int = 5, request_id: str = "r") -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=(last,), sampling=SamplingParams(seed=1, max_tokens=max_tokens)
    )


async def tokens(client: EngineClient, **kwargs: int) -> list[int]:
    return [t async for delta in client.stream(request(**kwargs)) for t in delta.token_ids]


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ready: asyncio.Queue[tuple[str, EngineClient, int]] = asyncio.Queue()
        self.exits: asyncio.Queue[EngineExit] = asyncio.Queue()

    def engine_ready(self, engine_id: str, client: EngineClient, pid: int) -> None:
        self.ready.put_nowait((engine_id, client, pid))

    def engine_exited(self, event: EngineExit) -> None:
        self.exits.put_nowait(event)


@pytest.fixture
def options(tmp_path):
    return ProcessOptions(run_dir=tmp_path / "run", log_dir=tmp_path / "logs")


@pytest.fixture
async def driver(options):
    states: list[tuple[str, ProcessState]] = []
    driver = ProcessDriver(argv, options, on_change=lambda info: states.append((info.engine_id, info.state)))
    driver.states = states
    yield driver
    await driver.close()
    for info in driver.processes():
        assert info.pid == 0


def alive(pid: int) -> bool:
    return identity(pid) != ""  # a process that only waits for its parent to look is not alive


async def test_start_serve_stop(driver):
    """An engine starts, is announced, serves, and ends when it is stopped; its log is kept and its socket is not."""
    listener = Listener()
    client = await driver.start_engine(spec(), listener)
    engine_id, announced, pid = listener.ready.get_nowait()
    assert (engine_id, announced) == ("e", client)
    assert len(await tokens(client)) == 5
    (info,) = driver.processes()
    assert (info.state, info.pid) == (ProcessState.READY, pid)
    await driver.stop_engine("e")
    await driver.stop_engine("e")
    assert not alive(pid)
    assert not os.path.exists(info.address)  # noqa: ASYNC240, PTH110
    assert "building the engine" in driver.logs("e")[0]
    event = listener.exits.get_nowait()
    assert (event.returncode, event.restart_in_s, event.pid) == (0, None, pid)
    assert [s.value for _, s in driver.states] == ["starting", "ready", "stopping", "stopped"]


async def test_kill_9(driver):
    """After kill -9 open streams end with EngineDiedError, the driver starts the engine again, and a new client serves."""
    listener = Listener()
    client = await driver.start_engine(spec(step_s=0.01), listener)
    pid = (await listener.ready.get())[2]
    stream = client.stream(request(max_tokens=10_000))
    await anext(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError):
        async for _ in stream:
            pass
    event = await listener.exits.get()
    assert (event.pid, event.returncode, event.restart_in_s) == (pid, -9, 0.01)
    assert "SIGKILL" in event.reason
    _, fresh, new_pid = await listener.ready.get()
    assert new_pid != pid
    assert await tokens(fresh) == [101, 102, 103, 104, 105]
    assert driver.processes()[0].restarts == 1


def mock(spec: EngineSpec, socket: str) -> list[str]:
    """The real engine process over the mock device."""
    config = msgspec.json.encode({"model": "mock", "engine_id": spec.engine_id, "mock": {"scale": 0.1}}).decode()
    return [sys.executable, "-m", "sagellm_core.server", "--config", config, "--socket", socket]


async def test_kv_hand_over_between_processes(options):
    """One engine process computes a prompt, another gets its blocks through shared memory and draws the same tokens."""
    driver = ProcessDriver(mock, options)
    one, other = await asyncio.gather(*(driver.start_engine(spec(name), Listener()) for name in ("p", "d")))
    assert isinstance(one, KVTransferClient)
    prompt = tuple(range(100))
    prefill = EngineRequest(request_id="a", prompt_token_ids=prompt, sampling=SamplingParams(seed=7, max_tokens=9))
    expected = [t async for delta in one.stream(prefill) for t in delta.token_ids]
    imported = await other.import_kv(await one.export_kv(KVExportRequest(token_ids=prompt)))
    assert imported.stored == 6
    deltas = [delta async for delta in other.stream(prefill)]
    assert max(delta.cached_tokens for delta in deltas) == 96
    assert [t for delta in deltas for t in delta.token_ids] == expected
    with pytest.raises(KVTransferError, match="no full block"):
        await one.export_kv(KVExportRequest(token_ids=(9,) * 50))
    await driver.close()


async def test_mock_engine_survives_kill_9(options):
    """The real engine process over the mock device is killed in mid-stream; its successor draws the same tokens, blocks all free."""
    driver, listener = ProcessDriver(mock, options), Listener()
    client = await driver.start_engine(spec(), listener)
    pid = (await listener.ready.get())[2]
    sampling = SamplingParams(seed=7, max_tokens=200, ignore_eos=True)
    whole = EngineRequest(request_id="a", prompt_token_ids=(72, 105), sampling=sampling)
    expected = [t async for delta in client.stream(whole) for t in delta.token_ids]
    stream, seen = client.stream(msgspec.structs.replace(whole, request_id="b")), []
    with pytest.raises(EngineDiedError):
        async for delta in stream:
            seen += delta.token_ids
            if len(seen) > 20:
                os.kill(pid, signal.SIGKILL)
    assert expected[: len(seen)] == seen
    _, fresh, _ = await listener.ready.get()
    rest = msgspec.structs.replace(whole, request_id="b", emitted_token_ids=tuple(seen))
    seen += [t async for delta in fresh.stream(rest) for t in delta.token_ids]
    assert seen == expected
    assert (await fresh.status()).blocks_used == 0
    await driver.close()


async def test_crash_loop_has_an_end(driver, tmp_path):
    """An engine that dies again and again is given up after the allowed attempts, with growing pauses."""
    listener, crash = Listener(), tmp_path / "crash"
    await driver.start_engine(spec(crash_file=str(crash)), listener)
    pid = (await listener.ready.get())[2]
    crash.touch()
    os.kill(pid, signal.SIGKILL)
    delays = []
    while (event := await listener.exits.get()).restart_in_s is not None:
        delays.append(event.restart_in_s)
    assert delays == [0.01, 0.02, 0.04]
    assert event.returncode == 9
    assert driver.processes()[0].state is ProcessState.FAILED
    crash.unlink()
    await driver.start_engine(spec(), listener)


async def test_a_crash_loop_that_heals(driver, tmp_path):
    """When the cause of a crash loop goes away within the allowed attempts the engine serves again."""
    listener, crash = Listener(), tmp_path / "crash"
    await driver.start_engine(spec(crash_file=str(crash)), listener)
    pid = (await listener.ready.get())[2]
    crash.touch()
    os.kill(pid, signal.SIGKILL)
    await listener.exits.get()
    await listener.exits.get()
    crash.unlink()
    _, client, _ = await listener.ready.get()
    assert len(await tokens(client)) == 5


async def test_start_failure_is_the_engines_own_error(driver):
    """A start that fails raises the engine's typed error, once, and leaves nothing running."""
    listener = Listener()
    with pytest.raises(ModelFileError, match="truncated at byte 12"):
        await driver.start_engine(spec(bad_model=True), listener)
    assert listener.ready.empty()
    assert listener.exits.empty()
    (info,) = driver.processes()
    assert (info.state, info.pid) == (ProcessState.FAILED, 0)


async def test_crash_while_starting_has_last_words(driver, tmp_path):
    """A process that dies before it is ready is reported with its exit status and its last words."""
    (tmp_path / "crash").touch()
    with pytest.raises(UnavailableError, match="ended with status 9 while it started"):
        await driver.start_engine(spec(crash_file=str(tmp_path / "crash")), Listener())


async def test_not_ready_in_time(driver):
    """A process that does not get ready is killed after the timeout."""
    slow = msgspec.structs.replace(spec(hang=True), ready_timeout_s=0.3)
    with pytest.raises(UnavailableError, match=r"not ready within 0\.3 s"):
        await driver.start_engine(slow, Listener())
    assert driver.processes()[0].pid == 0


async def test_cancelled_start_kills_the_process(driver):
    """Giving up on a start leaves no process behind."""
    task = asyncio.create_task(driver.start_engine(spec(hang=True), Listener()))
    await asyncio.sleep(0.2)
    pid = driver.processes()[0].pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pid)


async def test_no_such_program(options):
    """A command that cannot be executed is an error that names it."""
    driver = ProcessDriver(lambda spec, socket: ["/no/such/program"], options)
    with pytest.raises(UnavailableError, match="No such file or directory: check '/no/such/program'"):
        await driver.start_engine(spec(), Listener())
    await driver.close()


async def test_same_id_twice(driver):
    """A second engine of the same id is refused while the first lives."""
    await driver.start_engine(spec(), Listener())
    with pytest.raises(InvalidArgumentError, match="'e' is running"):
        await driver.start_engine(spec(), Listener())


async def test_stop_lets_sequences_finish(driver):
    """Stopping gives running sequences the grace time and loses none that fits into it."""
    client = await driver.start_engine(spec(step_s=0.02), Listener())
    stream = client.stream(request(max_tokens=20))
    seen = list((await anext(stream)).token_ids)
    stopping = asyncio.create_task(driver.stop_engine("e"))
    async for delta in stream:
        seen += delta.token_ids
    assert seen == list(range(101, 121))
    await stopping


async def test_stop_kills_what_does_not_end(driver):
    """An engine that does not end within the grace time is killed."""
    listener = Listener()
    client = await driver.start_engine(spec(), listener)
    pid = listener.ready.get_nowait()[2]
    stuck = asyncio.ensure_future(tokens(client, last=3))
    await asyncio.sleep(0.1)
    await driver.stop_engine("e", grace_s=0.2)
    assert not alive(pid)
    assert listener.exits.get_nowait().returncode == -9
    with pytest.raises(EngineDiedError):
        await stuck


async def test_restart_of_a_hung_engine_leaves_its_stacks(driver):
    """A hung engine that is restarted writes the stacks of its threads to its log, and comes back."""
    listener = Listener()
    client = await driver.start_engine(spec(), listener)
    await listener.ready.get()
    stuck = asyncio.ensure_future(tokens(client, last=3))
    await asyncio.sleep(0.3)
    await driver.restart_engine("e")
    with pytest.raises(EngineDiedError):
        await stuck
    _, fresh, _ = await listener.ready.get()
    assert len(await tokens(fresh)) == 5
    log = "\n".join(driver.logs("e"))
    assert "Fatal Python error: Aborted" in log
    assert "counting_engine.py" in log


async def test_stop_during_the_pause(driver):
    """An engine can be stopped while it waits for its restart."""
    listener = Listener()
    patient = msgspec.structs.replace(spec(), restart=RestartPolicy(first_delay_s=60))
    await driver.start_engine(patient, listener)
    os.kill((await listener.ready.get())[2], signal.SIGKILL)
    assert (await listener.exits.get()).restart_in_s == 30.0  # the longest pause
    await driver.stop_engine("e")
    assert driver.processes()[0].state is ProcessState.STOPPED


GATEWAY = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from test_process_driver import *
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
    here = str(Path(__file__).parent)
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


async def test_engine_on_tcp(driver, options):
    """An engine on TCP gets a reserved port and a token of its own; another client without the token is refused."""
    listener = Listener()
    tcp = msgspec.structs.replace(spec(), listen="tcp")
    client = await driver.start_engine(tcp, listener)
    assert len(await tokens(client)) == 5
    (info,) = driver.processes()
    assert info.address.startswith("tcp://127.0.0.1:89")
    (reservation,) = driver._store.reservations()
    assert reservation == ("port", info.address.rpartition(":")[2], "e")
    stranger = WireEngineClient("e", info.address)
    with pytest.raises(UnauthenticatedError):
        await stranger.connect()
    assert "SAGELLM_ENGINE_TOKEN" not in "".join(driver.logs("e"))
    await driver.stop_engine("e")
    assert driver._store.reservations() == []


async def test_gpus_are_reserved(driver, monkeypatch):
    """An engine sees the GPUs that were reserved for it and no others; too few is an error with the numbers."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    two = msgspec.structs.replace(spec("a"), gpus=2)
    await driver.start_engine(two, Listener())
    pid = driver.processes()[0].pid
    with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: ASYNC230, PTH123
        assert b"CUDA_VISIBLE_DEVICES=3,5\0" in file.read()
    with pytest.raises(ResourceExhaustedError, match="needs 2 of kind gpu, 1 of 3"):
        await driver.start_engine(msgspec.structs.replace(two, engine_id="b"), Listener())
    await driver.stop_engine("a")
    await driver.start_engine(msgspec.structs.replace(two, engine_id="b"), Listener())


def test_directory_of_sockets_is_ours_alone(tmp_path):
    """The directory of sockets is private; a link in its place, as a stranger might leave it, is refused."""
    make_private(tmp_path / "run")
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    (tmp_path / "run").chmod(0o777)
    make_private(tmp_path / "run")
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(UnavailableError, match="not this user's own directory"):
        make_private(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="File exists"):
        make_private(tmp_path / "file")


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


def test_log_rotation(tmp_path):
    """A log over its limit moves to the older part, the writer goes on, and the tail reads across both."""
    log = EngineLog(tmp_path / "d" / "e.log", max_bytes=100)
    fd = log.open()
    for k in range(20):
        os.write(fd, f"line {k}\n".encode())
    log.rotate()
    os.write(fd, b"line 20\n")
    os.close(fd)
    assert log.path.stat().st_size == 8
    assert log.tail(3) == ["line 18", "line 19", "line 20"]
    assert log.tail(0) == []
    assert log.last_words() == "line 20"
    assert log.path.stat().st_mode & 0o077 == 0


def test_log_of_nobody(tmp_path):
    """An engine that never wrote has an empty log."""
    log = EngineLog(tmp_path / "none.log", max_bytes=100)
    assert log.tail(10) == []
    assert log.last_words() == ""


async def test_an_engine_that_was_begun_is_the_one_that_starts(options, tmp_path):
    """What was begun before the event loop is taken by the start with the same configuration: one process, noted once."""
    store = Store(tmp_path / "engines.sqlite")
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
async def test_an_engine_that_was_begun_in_vain_is_ended(options, how):
    """What was begun and never started leaves no process, no note and no socket."""
    driver = ProcessDriver(argv, options)
    driver.begin(spec())
    (record,) = driver._store.processes()
    if how == "close":
        await driver.close()
    else:
        driver.drop_begun()
    assert not alive(record.pid)
    assert driver._store.processes() == []
    assert list(options.run_dir.iterdir()) == []


async def test_a_begun_engine_that_cannot_load_says_why(options):
    """An engine that ended before it was started reports its own error at the start."""
    driver = ProcessDriver(argv, options)
    driver.begin(spec(bad_model=True))
    with pytest.raises(ModelFileError):
        await driver.start_engine(spec(bad_model=True), Listener())
    await driver.close()


def test_nothing_is_begun_beside_engines_to_adopt(options, tmp_path):
    """Where an earlier driver's engines may live on, a start waits for `adopt`."""
    store = Store(tmp_path / "engines.sqlite")
    before = ProcessRecord(
        engine_id="e", pid=os.getpid(), identity=own_identity(), address="", token="", started_at=0.0, owner="gone", spec=spec()
    )  # fmt: skip
    store.put_process(before)
    driver = ProcessDriver(argv, options, store=store)
    driver.begin(spec())
    assert [record.pid for record in store.processes()] == [os.getpid()]
    driver.drop_begun()
    assert len(store.processes()) == 1
