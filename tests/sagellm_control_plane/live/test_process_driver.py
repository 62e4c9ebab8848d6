"""The driver over real processes: `counting_engine.py` in place of a model, and the mock engine where it matters."""

import asyncio
import os
import signal
import sys

import msgspec
import pytest
from counting import request
from counting_processes import Listener, alive, argv, spec, tokens

from sagellm_control_plane.live.engine_log import EngineLog
from sagellm_control_plane.live.lifecycle import EngineSpec, RestartPolicy
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessState
from sagellm_control_plane.live.processes import make_private
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
from sagellm_protocol.ports import KVTransferClient


@pytest.fixture
async def driver(options):
    states: list[tuple[str, ProcessState]] = []
    driver = ProcessDriver(argv, options, on_change=lambda info: states.append((info.engine_id, info.state)))
    driver.states = states
    yield driver
    await driver.close()
    for info in driver.processes():
        assert info.pid == 0


def mock(spec: EngineSpec, socket: str) -> list[str]:
    """The real engine process over the mock device."""
    config = msgspec.json.encode({"model": "mock", "engine_id": spec.engine_id, "mock": {"scale": 0.1}}).decode()
    return [sys.executable, "-m", "sagellm_core.server", "--config", config, "--socket", socket]


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
