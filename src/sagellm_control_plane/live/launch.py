"""One start of an engine process: its address and GPUs, the process itself, and what it reports before it serves."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sagellm_control_plane.live.child import Child, describe_exit
from sagellm_control_plane.live.engine_log import file_name
from sagellm_control_plane.live.engine_process import EngineProcess, ProcessOptions
from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.live.processes import identity, make_private, own_identity, port_is_free, visible_gpus
from sagellm_control_plane.live.store import ProcessRecord, Store
from sagellm_protocol.errors import SageError, UnavailableError
from sagellm_protocol.wire import StartReport

__all__ = ["ArgvFactory", "Launcher", "quoted"]

ArgvFactory = Callable[[EngineSpec, str], Sequence[str]]
"""(what to start, where it listens) -> command line. Where is the path of a Unix socket, or ``tcp://host:port`` (the token is in the
environment). The driver adds ``--status-fd``, ``--parent-fd`` and ``--orphan-grace``."""

_TOKEN_VARIABLE = "SAGELLM_ENGINE_TOKEN"  # noqa: S105 (a name, not a token)


class Launcher:
    """Starts processes, and notes them and what they reserve in the store.

    Args:
        argv: makes the command line of an engine.
        options: directories and ports.
        store: where processes and reservations are noted.
        orphan_grace_s: seconds that a process outlives this one.
    """

    def __init__(self, argv: ArgvFactory, options: ProcessOptions, store: Store, orphan_grace_s: float) -> None:
        self._argv = argv
        self._options = options
        self._store = store
        self._orphan_grace_s = orphan_grace_s

    async def launch(self, engine: EngineProcess) -> None:
        """Start the process and wait until it says that it serves.

        Raises:
            SageError: the engine's own error, or how it ended; the message has its last words.
            UnavailableError: it was not ready in time, or cannot be started.
        """
        spec = engine.spec
        status_fd = self._spawn(engine)
        try:
            line = await asyncio.wait_for(_read_line(status_fd), spec.ready_timeout_s)
        except asyncio.TimeoutError:
            raise UnavailableError(
                f"engine {spec.engine_id!r} was not ready within {spec.ready_timeout_s:g} s{quoted(engine.log.last_words())}"
            ) from None
        finally:
            os.close(status_fd)
        await _check_report(engine, line)

    def _spawn(self, engine: EngineProcess) -> int:
        """Start the process; return the file descriptor on which it reports."""
        environ = self._reserve(engine)
        make_private(self._options.run_dir)
        try:
            log_fd = engine.log.open()
        except OSError as exc:
            raise UnavailableError(
                f"cannot write to {exc.filename}: {exc.strerror}: choose another directory"
            ) from None
        status_read, status_write = os.pipe()
        parent_read, parent_write = os.pipe()
        argv = [*self._argv(engine.spec, engine.address)]
        argv += ["--status-fd", str(status_write), "--parent-fd", str(parent_read)]
        argv += ["--orphan-grace", str(self._orphan_grace_s)]
        try:
            child = Child.spawn(argv, log_fd=log_fd, pass_fds=[status_write, parent_read], environ=environ)
        except OSError as exc:
            os.close(status_read)
            os.close(parent_write)
            raise UnavailableError(
                f"engine {engine.spec.engine_id!r} cannot be executed: {exc.strerror}: check {argv[0]!r}"
            ) from None
        finally:
            for fd in (status_write, parent_read, log_fd):
                os.close(fd)
        engine.child = child
        engine.parent_fd = parent_write
        engine.started_at = time.time()
        self._store.put_process(
            ProcessRecord(
                engine_id=engine.spec.engine_id,
                pid=child.pid,
                identity=identity(child.pid),
                address=engine.address,
                token=engine.token,
                started_at=engine.started_at,
                owner=own_identity(),
                spec=engine.spec,
            )
        )
        return status_read

    def _reserve(self, engine: EngineProcess) -> dict[str, str]:
        """Choose address, token and GPUs; return what the process finds in its environment."""
        spec, environ = engine.spec, {}
        if spec.listen == "tcp":
            ports = [str(port) for port in self._options.ports]
            (port,) = self._store.reserve("port", spec.engine_id, ports, usable=port_is_free)
            engine.address, engine.token = f"tcp://127.0.0.1:{port}", secrets.token_urlsafe(24)
            environ[_TOKEN_VARIABLE] = engine.token
        else:
            engine.address = str(self._socket_path(spec.engine_id))
        if spec.gpus:
            gpus = self._store.reserve("gpu", spec.engine_id, visible_gpus(), spec.gpus)
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return environ

    def _socket_path(self, engine_id: str) -> Path:
        digest = hashlib.blake2b(f"{os.getpid()} {engine_id}".encode(), digest_size=6).hexdigest()
        return self._options.run_dir / f"{file_name(engine_id)[:24]}-{digest}.sock"


async def _check_report(engine: EngineProcess, line: bytes) -> None:
    assert engine.child is not None
    if not line:
        returncode = await engine.child.wait()
        raise UnavailableError(
            f"engine {engine.spec.engine_id!r} {describe_exit(returncode)} while it started"
            f"{quoted(engine.log.last_words())}"
        )
    try:
        report = msgspec.json.decode(line, type=StartReport)
    except msgspec.MsgspecError:
        raise UnavailableError(f"engine {engine.spec.engine_id!r} reported nonsense while it started") from None
    if report.error is not None:
        raise SageError.from_wire(report.error)


def quoted(words: str) -> str:
    """Return an engine's last words as the end of a message."""
    return f": {words}" if words else ""


async def _read_line(fd: int) -> bytes:
    """Return the first line that comes from a pipe; empty if it ends without one."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    line: asyncio.Future[bytes] = loop.create_future()
    buffer = bytearray()

    def readable() -> None:
        chunk = os.read(fd, 65536)
        buffer.extend(chunk)
        if (b"\n" in chunk or not chunk) and not line.done():
            line.set_result(bytes(buffer).partition(b"\n")[0] if b"\n" in buffer else b"")
            loop.remove_reader(fd)

    loop.add_reader(fd, readable)
    try:
        return await line
    finally:
        loop.remove_reader(fd)
