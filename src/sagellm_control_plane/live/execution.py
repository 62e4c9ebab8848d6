"""Executing an engine: what happens before somebody waits for it, so it needs no event loop."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sagellm_control_plane.live.child import execute
from sagellm_control_plane.live.engine_log import EngineLog, file_name
from sagellm_control_plane.live.engine_process import ProcessOptions
from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.live.processes import identity, make_private, own_identity, port_is_free, visible_gpus
from sagellm_control_plane.live.store import ProcessRecord, Store
from sagellm_protocol.errors import UnavailableError

__all__ = ["ArgvFactory", "Execution", "Executor"]

ArgvFactory = Callable[[EngineSpec, str], Sequence[str]]
"""(what to start, where it listens) -> command line. Where is the path of a Unix socket, or ``tcp://host:port`` (the token is in the
environment). The driver adds ``--status-fd``, ``--parent-fd`` and ``--orphan-grace``."""

_TOKEN_VARIABLE = "SAGELLM_ENGINE_TOKEN"  # noqa: S105 (a name, not a token)


@dataclass(frozen=True, slots=True)
class Execution:
    """An engine process that runs and has not been waited for.

    Attributes:
        process: the process.
        status_fd: where it reports that it is ready.
        parent_fd: it ends when this is closed.
        address, token: where it listens, and what a client must say there.
        started_at: unix seconds.
    """

    process: subprocess.Popen[bytes]
    status_fd: int
    parent_fd: int
    address: str
    token: str
    started_at: float

    def end(self) -> None:
        """Kill it and what belongs to it; for one that nobody has waited for."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.status_fd)
        os.close(self.parent_fd)
        if self.address.startswith("/"):
            Path(self.address).unlink(missing_ok=True)


class Executor:
    """Executes engines on this machine.

    Args:
        argv: makes the command line of an engine.
        options: directories and ports.
        store: where processes and reservations are noted.
        orphan_grace_s: seconds that an engine outlives this process.
    """

    def __init__(self, argv: ArgvFactory, options: ProcessOptions, store: Store, orphan_grace_s: float) -> None:
        self._argv = argv
        self._options = options
        self._store = store
        self._orphan_grace_s = orphan_grace_s

    def execute(self, spec: EngineSpec, log: EngineLog) -> Execution:
        """Execute an engine that writes to `log`.

        Raises:
            UnavailableError: its log cannot be written, or it cannot be executed.
            ResourceExhaustedError: no port, or not enough GPUs, are free.
        """
        address, token, environ = self._reserve(spec)
        make_private(self._options.run_dir)
        try:
            log_fd = log.open()
        except OSError as exc:
            raise UnavailableError(
                f"cannot write to {exc.filename}: {exc.strerror}: choose another directory"
            ) from None
        status_read, status_write = os.pipe()
        parent_read, parent_write = os.pipe()
        argv = [*self._argv(spec, address)]
        argv += ["--status-fd", str(status_write), "--parent-fd", str(parent_read)]
        argv += ["--orphan-grace", str(self._orphan_grace_s)]
        try:
            process = execute(argv, log_fd=log_fd, pass_fds=[status_write, parent_read], environ=environ)
        except OSError as exc:
            os.close(status_read)
            os.close(parent_write)
            raise UnavailableError(
                f"engine {spec.engine_id!r} cannot be executed: {exc.strerror}: check {argv[0]!r}"
            ) from None
        finally:
            for fd in (status_write, parent_read, log_fd):
                os.close(fd)
        execution = Execution(process, status_read, parent_write, address, token, time.time())
        self._note(spec, execution)
        return execution

    def forget(self, engine_id: str) -> None:
        """Strike out an engine that will not come back, and what was reserved for it."""
        self._store.remove_process(engine_id)
        self._store.release(engine_id)

    def _note(self, spec: EngineSpec, execution: Execution) -> None:
        self._store.put_process(
            ProcessRecord(
                engine_id=spec.engine_id,
                pid=execution.process.pid,
                identity=identity(execution.process.pid),
                address=execution.address,
                token=execution.token,
                started_at=execution.started_at,
                owner=own_identity(),
                spec=spec,
            )
        )

    def _reserve(self, spec: EngineSpec) -> tuple[str, str, dict[str, str]]:
        """Choose address, token and GPUs; also return what the process finds in its environment."""
        environ: dict[str, str] = {}
        address, token = str(self._socket_path(spec.engine_id)), ""
        if spec.listen == "tcp":
            ports = [str(port) for port in self._options.ports]
            (port,) = self._store.reserve("port", spec.engine_id, ports, usable=port_is_free)
            address, token = f"tcp://127.0.0.1:{port}", secrets.token_urlsafe(24)
            environ[_TOKEN_VARIABLE] = token
        if spec.gpus:
            gpus = self._store.reserve("gpu", spec.engine_id, visible_gpus(), spec.gpus)
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return address, token, environ

    def _socket_path(self, engine_id: str) -> Path:
        digest = hashlib.blake2b(f"{os.getpid()} {engine_id}".encode(), digest_size=6).hexdigest()
        return self._options.run_dir / f"{file_name(engine_id)[:24]}-{digest}.sock"
