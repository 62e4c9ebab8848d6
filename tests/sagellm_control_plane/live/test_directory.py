"""Engines that come from a file, from local ports, or with a lease; against real servers on loopback."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import pytest

from sagellm_control_plane.config import CoreConfig, HealthConfig
from sagellm_control_plane.live import directory
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.types import EngineState
from sagellm_protocol.errors import InvalidArgumentError

HEALTH = CoreConfig(health=HealthConfig(interval_s=0.02))


async def until(holds) -> None:
    while not holds():  # noqa: ASYNC110 - pytest's timeout bounds the wait
        await asyncio.sleep(0.002)


@asynccontextmanager
async def server(model: str, owner: str):
    """A server that lists one model."""
    body = json.dumps({"data": [{"id": model, "owned_by": owner}]})

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await listener.wait_closed()


def toml(*ports: int) -> str:
    rows = (f'[[engines]]\nengine_id = "e{p}"\nmodel_id = "m"\nhost = "127.0.0.1"\nport = {p}\n' for p in ports)
    return "".join(rows) or "engines = []\n"


@pytest.fixture
def quick(monkeypatch):
    """A directory that looks often."""
    init = directory.Directory.__init__
    monkeypatch.setattr(
        directory.Directory, "__init__", lambda self, *args, **more: init(self, *args, **more, interval_s=0.01)
    )


async def test_engines_of_a_file_come_and_go_with_it(tmp_path, quick):
    """What the file lists is registered and READY; what leaves it is forgotten; a broken change leaves all as it is."""
    file = tmp_path / "engines.toml"
    async with server("m", "vllm") as one, server("m", "vllm") as two:
        file.write_text(toml(one))
        manager = ControlPlaneManager(config=HEALTH, engine_file=file)
        await manager.start()
        try:
            await until(lambda: [e.state for e in manager.list_engines()] == [EngineState.READY])
            file.write_text(toml(one, two))
            await until(lambda: len(manager.list_engines(EngineState.READY)) == 2)
            file.write_text("engines = 1")
            await asyncio.sleep(0.05)
            assert len(manager.list_engines(EngineState.READY)) == 2
            file.write_text(toml(two))
            await until(lambda: [e.engine_id for e in manager.list_engines()] == [f"e{two}"])
        finally:
            await manager.stop()


async def test_known_engines_are_ready_when_the_start_is_over(tmp_path):
    """An engine of the file, and one that was registered before, take requests at once: no interval of probes passes first."""
    file = tmp_path / "engines.toml"
    async with server("m", "vllm") as one, server("m", "vllm") as two:
        file.write_text(toml(one))
        manager = ControlPlaneManager(health_check_interval=3600.0, engine_file=file)
        manager.register_engine("before", "m", "127.0.0.1", two)
        await manager.start()
        try:
            assert len(manager.list_engines(EngineState.READY)) == 2
            manager.register_engine("after", "m", "127.0.0.1", two)
            await manager.settle()
            assert len(manager.list_engines(EngineState.READY)) == 3
        finally:
            await manager.stop()


async def test_an_engine_that_does_not_answer_does_not_hold_up_the_start(monkeypatch):
    """A listener that never answers costs the start its own bound, not the time that a probe may take."""
    monkeypatch.setattr(ControlPlaneManager.settle, "__defaults__", (0.01,))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        manager = ControlPlaneManager(config=CoreConfig(health=HealthConfig(timeout_s=3600.0)))
        manager.register_engine("silent", "m", "127.0.0.1", silent.getsockname()[1])
        await manager.start()
        assert [engine.state for engine in manager.list_engines()] == [EngineState.STARTING]
        await manager.stop()


async def test_a_file_that_cannot_be_used_is_refused_at_the_start(tmp_path):
    """A missing file, an unknown field and an id that is there twice are errors with the file's name."""
    file = tmp_path / "engines.json"
    with pytest.raises(InvalidArgumentError, match=r"engines\.json"):
        ControlPlaneManager(engine_file=file)
    row = {"engine_id": "a", "model_id": "m", "host": "h", "port": 1}
    for engines in ([{**row, "colour": "red"}], [row, row]):
        file.write_text(json.dumps({"engines": engines}))
        with pytest.raises(InvalidArgumentError, match=r"engines\.json"):
            ControlPlaneManager(engine_file=file)
    with pytest.raises(InvalidArgumentError, match="mode"):
        ControlPlaneManager(mode="local", discover=True)


async def test_servers_on_local_ports_are_found(monkeypatch, quick):
    """A vLLM that listens on a port that is looked at becomes an engine of its flavour; a gateway of ours does not."""
    async with server("theirs", "vllm") as port, server("ours", "isagellm") as gateway:
        monkeypatch.setattr("sagellm_control_plane.manager.LOCAL_PORTS", (port, gateway))
        manager = ControlPlaneManager(config=HEALTH, discover=True)
        await manager.start()
        try:
            await until(lambda: manager.list_engines(EngineState.READY))
            await asyncio.sleep(0.05)
            (info,) = manager.list_engines()
            assert (info.engine_id, info.metadata) == (f"127.0.0.1:{port}/theirs", {"flavour": "vllm"})
        finally:
            await manager.stop()


async def test_an_engine_with_a_lease_stays_while_it_sends_heartbeats():
    """Heartbeats keep it; without them it is forgotten when the lease has run out, although it still answers."""
    async with server("m", "vllm") as port:
        manager = ControlPlaneManager(config=HEALTH)
        await manager.start()
        try:
            manager.register_engine("a", "m", "127.0.0.1", port, metadata={"lease_s": 0.3})
            for _ in range(8):
                await asyncio.sleep(0.1)
                manager.record_engine_heartbeat("a")
            assert manager.get_engine_info("a").state is EngineState.READY
            await until(lambda: manager.list_engines() == [])
        finally:
            await manager.stop()


async def test_a_lease_is_a_time():
    """A lease of no time is refused and nothing stays registered."""
    manager = ControlPlaneManager()
    for lease in (0, -1, "long"):
        with pytest.raises(InvalidArgumentError, match="lease_s"):
            manager.register_engine("a", "m", "127.0.0.1", 1, metadata={"lease_s": lease})
    assert manager.list_engines() == []


async def test_engines_of_the_directory_are_not_kept_in_the_store(tmp_path, store):
    """The file is the truth about its engines: what left it while nobody looked does not come back from the store."""
    file = tmp_path / "engines.toml"
    file.write_text(toml(1))
    manager = ControlPlaneManager(config=HEALTH, engine_file=file, store=store)
    await manager.start()
    assert len(manager.list_engines()) == 1
    assert store.engines() == []
    await manager.stop()
