"""``sage-llm serve --workers N``: one supervisor that owns the engines, N gateway processes that share its port.

A gateway that dies takes its connections along and nothing else: the engines live on, the other workers serve on, and the
supervisor starts another. Workers end when the supervisor does, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sagellm import compose
from sagellm.cli.relay import Relay
from sagellm.cli.server_process import ServeOptions, announce, say
from sagellm_control_plane.live.child import Child, describe_exit
from sagellm_control_plane.live.follower import (
    LINE_BYTES,
    Answer,
    Ask,
    EngineDown,
    EngineUp,
    FollowerDriver,
    FromWorker,
    Join,
    Joined,
    RestartWanted,
    ToWorker,
    WorkerUp,
    line,
)
from sagellm_control_plane.live.lifecycle import EngineExit, LifecycleListener
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_protocol.errors import InvalidArgumentError, UnavailableError
from sagellm_protocol.ports import EngineClient

if TYPE_CHECKING:
    from sagellm_gateway.config import GatewayConfig

__all__ = ["Supervisor", "main"]

_PAUSE_S = 0.2
_MOST_DEATHS = 5
_DEATHS_WITHIN_S = 30.0
_LEAVE_S = 10.0
_BRING_UP_S = 5.0


class Supervisor(LifecycleListener):
    """Starts engines and workers, keeps both alive, and tells workers of engines.

    Args:
        options: what is served.
        gateway: the workers' configuration.
        sock: the listening socket that workers accept on.
        url: for people.
        keys: whether a request needs one, and one line on who may call.
    """

    def __init__(
        self, options: ServeOptions, gateway: GatewayConfig, sock: socket.socket, url: str, keys: tuple[bool, str]
    ) -> None:
        if gateway.state_path is None:
            raise InvalidArgumentError(
                "--workers needs a state file that the workers share: leave --state none out", param="workers"
            )
        if options.control.get("enable_auto_scaling"):
            raise InvalidArgumentError(
                "--auto-scale decides in one process: leave out either it or --workers", param="auto_scale"
            )
        self._options = options
        self._gateway = gateway
        self._sock = sock
        self._count = options.workers
        self._url = url
        self._keys = keys
        self._began = time.perf_counter()
        self._configs = configs = options.configs()
        self._catalog = compose.StoreCatalog(configs, options.changes)
        self._driver = ProcessDriver(partial(compose.engine_argv, keep_alive_s=options.keep_alive_s))
        self._up: dict[str, EngineUp] = {}
        self._workers: dict[int, tuple[Child, asyncio.StreamWriter]] = {}
        self._serving: set[int] = set()
        self._relay = Relay()
        self._all_up = asyncio.Event()
        self._stopping = asyncio.Event()
        self._failure: str | None = None

    async def run(self) -> None:
        """Serve until a signal.

        Raises:
            SageError: an engine cannot be started, or workers die again and again.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopping.set)
        slots: list[asyncio.Task[None]] = []
        try:
            for model_id, engine_id, told in self._options.planned(self._configs):
                await self._start_engine(model_id, engine_id, told)
            slots = [asyncio.create_task(self._keep_worker()) for _ in range(self._count)]
            await self._first(self._all_up.wait())
            if not self._stopping.is_set():
                pids = ", ".join(str(child.pid) for child, _ in self._workers.values())
                say("workers", f"{self._count}: pids {pids}")
                announce(self._url, self._began, self._keys, self._configs)
            await self._stopping.wait()
        finally:
            await self._leave(slots)
        if self._failure is not None:
            raise UnavailableError(self._failure)

    async def _first(self, wanted: Any) -> None:
        """Wait for `wanted`, or until it is time to stop."""
        tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(self._stopping.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _start_engine(self, model_id: str, engine_id: str, options: dict[str, Any]) -> None:
        began = time.perf_counter()
        await self._driver.start_engine(self._catalog.engine_spec(model_id, engine_id, options), self)
        say("engine", f"{engine_id}: {model_id}, pid {self._up[engine_id].pid} ({time.perf_counter() - began:.1f} s)")

    # the listener of the process driver

    def engine_ready(self, engine_id: str, client: EngineClient, pid: int) -> None:
        """Tell the workers where it is."""
        del client  # each worker has its own connection
        address = next(info.address for info in self._driver.processes() if info.engine_id == engine_id)
        self._up[engine_id] = EngineUp(engine_id=engine_id, address=address, token="", pid=pid)
        self._relay.forget(f"drain {engine_id}")  # a new engine takes requests
        self._tell(self._up[engine_id])

    def engine_exited(self, event: EngineExit) -> None:
        """Tell the workers that it has gone."""
        self._up.pop(event.engine_id, None)
        self._tell(EngineDown(event=event))

    def _tell(self, message: ToWorker) -> None:
        for _, writer in self._workers.values():
            writer.write(line(message))

    # workers

    async def _keep_worker(self) -> None:
        """Keep one worker alive."""
        deaths: list[float] = []
        while not self._stopping.is_set():
            child, listening = await self._spawn()
            returncode = await child.wait()
            listening.cancel()
            self._workers.pop(child.pid)[1].close()
            self._serving.discard(child.pid)
            self._relay.leave(child.pid)
            if self._stopping.is_set():
                return
            sys.stderr.write(f"worker {child.pid} {describe_exit(returncode)}: starting another\n")
            deaths = [at for at in deaths if time.monotonic() - at < _DEATHS_WITHIN_S] + [time.monotonic()]
            if len(deaths) >= _MOST_DEATHS:
                self._failure = (
                    f"workers died {len(deaths)} times within {_DEATHS_WITHIN_S:g} s: see their last words above"
                )
                self._stopping.set()
                return
            await asyncio.sleep(_PAUSE_S)

    async def _spawn(self) -> tuple[Child, asyncio.Task[None]]:
        ours, theirs = socket.socketpair()
        order = {"options": self._options, "gateway": self._gateway, "log_dir": str(ProcessOptions.default().log_dir)}
        argv = [sys.executable, "-m", "sagellm.cli.workers", str(theirs.fileno()), str(self._sock.fileno())]
        child = Child.spawn(argv, log_fd=sys.stderr.fileno(), pass_fds=[theirs.fileno(), self._sock.fileno()])
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        writer.write(msgspec.json.encode(order) + b"\n")
        for up in self._up.values():
            writer.write(line(up))
        self._workers[child.pid] = (child, writer)
        return child, asyncio.create_task(self._listen(child.pid, reader, writer))

    async def _listen(self, worker: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = msgspec.json.Decoder(FromWorker)
        with contextlib.suppress(ConnectionResetError):
            while said := await reader.readline():
                match decoder.decode(said):
                    case Join(pid=pid):
                        self._relay.join(pid, writer)
                        writer.write(line(Joined()))
                    case WorkerUp(pid=pid):
                        self._serving.add(pid)
                        if len(self._serving) == self._count:
                            self._all_up.set()
                    case RestartWanted(engine_id=engine_id):
                        with contextlib.suppress(InvalidArgumentError):  # another worker was faster
                            await self._driver.restart_engine(engine_id)
                    case Ask() as ask:
                        self._relay.ask(worker, ask)
                    case Answer() as answer:
                        self._relay.answer(worker, answer)

    async def _leave(self, slots: list[asyncio.Task[None]]) -> None:
        """End the workers, which finish what runs, then the engines."""
        self._stopping.set()
        for child, _ in self._workers.values():
            child.terminate()
        if slots:
            _, late = await asyncio.wait(slots, timeout=self._options.grace_s + _LEAVE_S)
            for child, _ in self._workers.values():
                child.kill()
            if late:
                await asyncio.wait(late, timeout=_LEAVE_S)
        await self._driver.close()


class _Order(msgspec.Struct):
    """What a worker is told first."""

    options: dict[str, Any]
    gateway: dict[str, Any]
    log_dir: str


def main(control_fd: int, listen_fd: int) -> None:
    """Run one worker until it is told to end."""
    from sagellm_gateway.config import GatewayConfig
    from sagellm_gateway.uvicorn_server import calm_collector, server_of

    control = socket.socket(fileno=control_fd)
    with control.makefile("rb", buffering=0) as file:
        order = msgspec.json.decode(file.readline(), type=_Order)
    options = msgspec.convert(order.options, ServeOptions)
    gateway = msgspec.convert(order.gateway, GatewayConfig)
    configs = options.configs()
    driver = FollowerDriver(control, Path(order.log_dir))
    house = compose.build_worker(
        configs,
        gateway,
        driver,
        options.changes,
        remember=options.port != 0,
        scheduling_policy=options.policy,
        **options.control,
    )

    async def bring_up() -> None:
        for model_id, engine_id, told in options.planned(configs):
            await house.start_engine(model_id, engine_id, told)
        house.share(driver)
        await driver.join(os.getpid())
        await house.manager.settle()
        calm_collector()
        house.set_ready(True)
        driver.serving(os.getpid())

    async def follow() -> None:
        await driver.follow()
        os.kill(os.getpid(), signal.SIGTERM)  # the supervisor has gone: finish what runs, and go too

    @contextlib.asynccontextmanager
    async def beside() -> AsyncIterator[None]:
        house.set_ready(False)
        await driver.open()
        tasks = [asyncio.create_task(follow()), asyncio.create_task(bring_up())]
        # Connections wait in the socket's queue meanwhile: a worker that does not know all engines would call their models unknown.
        await asyncio.wait(tasks[1:], timeout=_BRING_UP_S)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    server = server_of(house.server_app(beside), gateway)
    server.run(sockets=[socket.socket(fileno=listen_fd)])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
