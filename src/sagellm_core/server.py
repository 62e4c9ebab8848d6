"""An engine in its own process: ``python -m sagellm_core.server --config JSON --socket PATH``.

The process is ready when it answers `Hello` with `Welcome`, or when its line on ``--status-fd`` has an address. It ends

* with 0 after SIGTERM, SIGINT or a `drain` call, once its sequences have finished (or the grace time is over);
* with 1 from the watchdog, with the stacks of all threads on stderr;
* with 2 for a wrong command line;
* with 3 if it could not start: one line on stderr, the typed error on ``--status-fd``;
* with 4 if the engine died under it.

On a Unix socket the file's mode (0600) keeps others out. TCP needs a token, from the environment variable ``SAGELLM_ENGINE_TOKEN``: a
command line can be read by everybody on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sagellm_core.connection import Connection
from sagellm_core.listener import listen_tcp, listen_unix, send_report
from sagellm_core.watchdog import Watchdog
from sagellm_protocol import wire
from sagellm_protocol.engine import EngineDescription, EngineRequest
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnauthenticatedError, UnsupportedError
from sagellm_protocol.ports import EngineClient

if TYPE_CHECKING:
    from sagellm_core.local import Outlet

__all__ = ["EXIT_ENGINE_DIED", "EXIT_OK", "EXIT_START_FAILED", "TOKEN_VARIABLE", "EngineServer", "main", "run"]

EXIT_OK = 0
EXIT_START_FAILED = 3
EXIT_ENGINE_DIED = 4

TOKEN_VARIABLE = "SAGELLM_ENGINE_TOKEN"  # noqa: S105 (a name, not a token)

_log = logging.getLogger("sagellm_core.server")


class EngineServer:
    """Serves one engine to any number of connections.

    Args:
        engine: what to serve; closed by `run`.
        description: its description.
        listener: a listening socket.
        token: what a client must say in `Hello`; None where the socket itself keeps others out.
        heartbeat_s: seconds between heartbeats.
        grace_s: seconds that sequences have to finish after SIGTERM.
        watchdog: told of progress with each heartbeat.
        orphan_grace_s: seconds that an engine without a parent lives without a client.
    """

    def __init__(
        self,
        engine: EngineClient,
        description: EngineDescription,
        listener: socket.socket,
        *,
        token: str | None = None,
        heartbeat_s: float = 1.0,
        grace_s: float = 30.0,
        watchdog: Watchdog | None = None,
        orphan_grace_s: float = 0.0,
    ) -> None:
        self.engine = engine
        self.description = description
        self.token = token
        self.submit: Callable[[EngineRequest, Outlet, int], Callable[[], None]] | None = getattr(engine, "submit", None)
        self.connections: set[Connection] = set()
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._listener = listener
        self._heartbeat_s = heartbeat_s
        self._grace_s = grace_s
        self._watchdog = watchdog
        self._orphan_grace_s = orphan_grace_s
        self._orphan = False
        self._orphan_timer: asyncio.TimerHandle | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended: asyncio.Future[int] = self.loop.create_future()
        self._drainer: asyncio.Task[None] | None = None
        self._methods: dict[str, Callable[[Any], Any]] = {
            "describe": lambda _: self.engine.describe(),
            "status": lambda _: self._status(),
            "abort": lambda params: self.engine.abort(params.request_id),
            "drain": self._drain_call,
        }
        optional: dict[str, Callable[[Any, Any], Any]] = {
            "block_events": lambda method, params: method(params.after),
            "block_snapshot": lambda method, _: method(),
            "discard_kv": lambda method, params: method(params.name),
            "embed": lambda method, params: method(params),
            "export_kv": lambda method, params: method(params),
            "import_kv": lambda method, params: method(params),
            "load_adapter": lambda method, params: method(params.name, params.path),
            "unload_adapter": lambda method, params: method(params.name),
        }
        for name, invoke in optional.items():
            method = getattr(engine, name, None)
            if method is not None:
                self._methods[name] = partial(invoke, method)

    async def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Serve until drained or dead; return the exit status. `ready` is called once clients can connect."""
        server = await self.loop.create_server(lambda: Connection(self), sock=self._listener)
        heartbeat = self.loop.create_task(self._beat())
        heartbeat.add_done_callback(self._heart_stopped)
        ready()
        try:
            return await asyncio.shield(self._ended)
        finally:
            server.close()
            heartbeat.cancel()
            if self._orphan_timer is not None:
                self._orphan_timer.cancel()
            if self._watchdog is not None:
                self._watchdog.stop()
            await self._leave()

    def stop(self) -> None:
        """Drain, then end `run`; a second call does not wait for sequences."""
        if self._drainer is not None:
            self._finish(EXIT_OK)
            return
        _log.info("draining: %d sequences to finish within %g s", self._running, self._grace_s)
        self._drain(self._grace_s)

    def parent_ended(self) -> None:
        """Whoever started the engine has gone: end, unless somebody takes it over (connects) within the grace time."""
        self._orphan = True
        if self._orphan_grace_s <= 0:
            _log.warning("the process that started this engine has ended: draining")
            self.stop()
            return
        _log.warning("the process that started this engine has ended: waiting %g s for another", self._orphan_grace_s)
        self.connections_changed()

    # for connections

    def connections_changed(self) -> None:
        """A client came or went."""
        if self._orphan_timer is not None:
            self._orphan_timer.cancel()
            self._orphan_timer = None
        if self._orphan and self._orphan_grace_s > 0 and not self.connections and self._drainer is None:
            self._orphan_timer = self.loop.call_later(self._orphan_grace_s, self.stop)

    def welcome(self) -> wire.Welcome:
        """The answer to a client's hello."""
        return wire.Welcome(
            description=self.description, methods=tuple(sorted(self._methods)), heartbeat_s=self._heartbeat_s
        )

    async def invoke(self, method: str, params: Any) -> Any:
        """Answer a call.

        Raises:
            UnsupportedError: the engine lacks the method.
        """
        handler = self._methods.get(method)
        if handler is None:
            raise UnsupportedError(f"method {method!r} is not offered by this engine", param="method")
        return await handler(params)

    def sequence_started(self) -> None:
        """Count a sequence in."""
        self._running += 1
        self._idle.clear()

    def sequence_ended(self) -> None:
        """Count it out."""
        self._running -= 1
        if self._running == 0:
            self._idle.set()

    def engine_died(self, error: SageError) -> None:
        """End the process: whoever started it decides on a new one."""
        _log.error("the engine died: %s", error.message)
        self._finish(EXIT_ENGINE_DIED)

    # inside

    async def _status(self) -> Any:
        import msgspec

        status = await self.engine.status()
        return msgspec.structs.replace(status, draining=True) if self.draining else status

    async def _drain_call(self, params: wire.DrainParams) -> None:
        self._drain(params.timeout_s)

    def _drain(self, timeout_s: float) -> None:
        if self._drainer is None:
            self.draining = True
            self._drainer = self.loop.create_task(self._drain_within(timeout_s))

    async def _drain_within(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            _log.warning("%d sequences did not finish within %g s: aborted", self._running, timeout_s)
        self._finish(EXIT_OK)

    def _finish(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)

    async def _leave(self) -> None:
        aborted = [task for connection in self.connections for task in connection.abort_all()]
        if aborted:
            await asyncio.wait(aborted, timeout=5.0)
        for connection in list(self.connections):
            connection.end("the engine is shutting down")
        if self._drainer is not None:
            self._drainer.cancel()
        await self.engine.close()

    async def _beat(self) -> None:
        while True:
            status = await self._status()
            if self._watchdog is not None:
                self._watchdog.report(
                    status.steps, busy=status.phase == "ready" and status.running + status.waiting > 0
                )
            frame = wire.encode_frame(wire.Heartbeat(status=status))
            for connection in list(self.connections):
                connection.beat(frame)
            await asyncio.sleep(self._heartbeat_s)

    def _heart_stopped(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        exc = task.exception()
        _log.error("the engine does not answer: %s", exc)
        self._finish(EXIT_ENGINE_DIED)


async def run(
    engine: EngineClient,
    listener: socket.socket,
    *,
    token: str | None = None,
    heartbeat_s: float = 1.0,
    grace_s: float = 30.0,
    hang_s: float = 120.0,
    status_fd: int | None = None,
    parent_fd: int | None = None,
    orphan_grace_s: float = 0.0,
    keep_alive_s: float = 0.0,
    rebuild: Callable[[], EngineClient] | None = None,
) -> int:
    """Serve `engine` on `listener` with signals, watchdog and reports in place; return the exit status.

    Args:
        engine: what to serve.
        listener: a listening socket.
        token: what a client must say in `Hello`.
        heartbeat_s: seconds between heartbeats.
        grace_s: seconds that sequences have to finish after SIGTERM.
        hang_s: seconds without progress after which the process dumps its stacks and ends; 0 is never.
        status_fd: where the one line of readiness goes.
        parent_fd: the process drains and ends when this is closed at the other end.
        orphan_grace_s: seconds that it waits then for a client, before it does so.
        keep_alive_s: idle seconds after which the engine is closed; 0 is never.
        rebuild: makes the engine again when a request comes after that.
    """
    description = await engine.describe()
    if keep_alive_s > 0 and rebuild is not None:
        from sagellm_core.keepalive import KeepAliveEngine

        engine = KeepAliveEngine(engine, description, rebuild, keep_alive_s)
    watchdog = Watchdog(hang_s, sys.stderr) if hang_s > 0 else None
    server = EngineServer(
        engine,
        description,
        listener,
        token=token,
        heartbeat_s=heartbeat_s,
        grace_s=grace_s,
        watchdog=watchdog,
        orphan_grace_s=orphan_grace_s,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        server.loop.add_signal_handler(number, server.stop)
    if parent_fd is not None:
        _follow(parent_fd, server)
    address = _address(listener)
    _log.info("engine %s serves %s on %s", server.description.engine_id, server.description.model, address)
    try:
        return await server.run(lambda: send_report(status_fd, wire.StartReport(address=address)))
    finally:
        _remove_socket(address)


def _follow(parent_fd: int, server: EngineServer) -> None:
    os.set_blocking(parent_fd, False)

    def readable() -> None:
        if os.read(parent_fd, 64) == b"":
            server.loop.remove_reader(parent_fd)
            server.parent_ended()

    server.loop.add_reader(parent_fd, readable)


def _address(listener: socket.socket) -> str:
    name = listener.getsockname()
    return f"unix://{name}" if listener.family == socket.AF_UNIX else f"tcp://{name[0]}:{name[1]}"


def _remove_socket(address: str) -> None:
    if address.startswith("unix://"):
        Path(address.removeprefix("unix://")).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the process; return its exit status."""
    args = _parser().parse_args(argv)
    faulthandler.enable()
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        listener, token = _listen(args)
        engine = _build(args.config)
    except SageError as exc:
        _fail(args.status_fd, exc)
    serving = run(
        engine,
        listener,
        token=token,
        heartbeat_s=args.heartbeat,
        grace_s=args.grace,
        hang_s=args.hang_timeout,
        status_fd=args.status_fd,
        parent_fd=args.parent_fd,
        orphan_grace_s=args.orphan_grace,
        keep_alive_s=args.keep_alive,
        rebuild=lambda: _build(args.config),
    )
    with _runner() as runner:
        status: int = runner.run(serving)
    return status


def _listen(args: argparse.Namespace) -> tuple[socket.socket, str | None]:
    if args.socket is not None:
        return listen_unix(args.socket), None
    token = os.environ.pop(TOKEN_VARIABLE, "")
    if not token:
        raise UnauthenticatedError(f"--tcp needs a token: set {TOKEN_VARIABLE}, or use --socket")
    host, _, port = args.tcp.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgumentError(f"--tcp is {args.tcp!r}: give HOST:PORT", param="tcp")
    return listen_tcp(host.strip("[]"), int(port)), token


def _build(text: str) -> EngineClient:
    import msgspec

    from sagellm_core.client import local_client
    from sagellm_core.config import EngineConfig

    try:
        config = msgspec.json.decode(text, type=EngineConfig)
    except msgspec.MsgspecError as exc:
        raise InvalidArgumentError(f"--config: {exc}", param="config") from None
    return local_client(config)


def _runner() -> Any:
    """Return a context manager with `run`; on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return _PlainRunner()
    return _PlainRunner(uvloop.new_event_loop)


class _PlainRunner:
    """`asyncio.Runner`, which Python 3.10 lacks, as far as a process with one loop needs it."""

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop) -> None:
        self._loop = factory()

    def __enter__(self) -> _PlainRunner:
        return self

    def run(self, main: Any) -> Any:
        return self._loop.run_until_complete(main)

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


def _fail(status_fd: int | None, error: SageError) -> NoReturn:
    send_report(status_fd, wire.StartReport(error=error.to_wire()))
    sys.stderr.write(f"engine cannot start: {error.message}\n")
    raise SystemExit(EXIT_START_FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sagellm_core.server", description="One engine in its own process.")
    parser.add_argument("--config", required=True, help="the engine's configuration as JSON")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path, help="path of the Unix socket to listen on")
    where.add_argument("--tcp", metavar="HOST:PORT", help=f"listen on TCP; the token is in {TOKEN_VARIABLE}")
    parser.add_argument("--status-fd", type=int, help="file descriptor for the one line of readiness")
    parser.add_argument("--parent-fd", type=int, help="end when this file descriptor is closed at the other end")
    parser.add_argument("--orphan-grace", type=float, default=0.0, help="seconds to wait for a client after that")
    parser.add_argument("--heartbeat", type=float, default=1.0, help="seconds between heartbeats")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for sequences to finish after SIGTERM")
    parser.add_argument(
        "--hang-timeout", type=float, default=120.0, help="seconds without progress before exit; 0 is never"
    )
    parser.add_argument(
        "--keep-alive", type=float, default=0.0, help="idle seconds before the model is unloaded; 0 is never"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
