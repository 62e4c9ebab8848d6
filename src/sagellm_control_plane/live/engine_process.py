"""One engine as a process of this machine, over all its restarts, and what the driver of such engines is told."""

from __future__ import annotations

import asyncio
import os
import tempfile
from enum import Enum
from pathlib import Path

import msgspec

from sagellm_control_plane.live.child import Child
from sagellm_control_plane.live.engine_log import EngineLog
from sagellm_control_plane.live.lifecycle import EngineSpec, LifecycleListener
from sagellm_control_plane.live.processes import AdoptedProcess
from sagellm_control_plane.live.wire_client import WireEngineClient, WireTimeouts

__all__ = ["EngineProcess", "ProcessInfo", "ProcessOptions", "ProcessState"]


class ProcessState(str, Enum):
    """Where an engine process is in its life."""

    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class ProcessInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An engine process as people see it; `started_at` is in unix seconds."""

    engine_id: str
    model_id: str
    state: ProcessState
    pid: int
    restarts: int
    started_at: float
    address: str
    log: str
    reason: str = ""


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where things lie and how long they take.

    Attributes:
        run_dir: for sockets; short, because a socket's path has at most 107 bytes.
        log_dir: for ``<engine>.log``.
        log_bytes: of each log; twice that is kept.
        timeouts: of the connections.
        orphan_grace_s: seconds that an engine outlives a driver with a store, for the next driver to adopt it.
        ports: of engines that listen on TCP, in order of preference.
    """

    run_dir: Path
    log_dir: Path
    log_bytes: int = 16 * 2**20
    timeouts: WireTimeouts = WireTimeouts()
    orphan_grace_s: float = 60.0
    ports: tuple[int, ...] = tuple(range(8902, 9002))

    @classmethod
    def default(cls) -> ProcessOptions:
        """Return the user's own directories: the runtime directory, and the state directory for logs."""
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        run_dir = Path(runtime, "isagellm") if runtime else Path(tempfile.gettempdir(), f"isagellm-{os.getuid()}")
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return cls(run_dir=run_dir, log_dir=Path(state, "isagellm", "logs"))


class EngineProcess:
    """One supervised engine, over all its restarts."""

    def __init__(self, spec: EngineSpec, listener: LifecycleListener, log: EngineLog) -> None:
        self.spec = spec
        self.listener = listener
        self.address = ""
        self.token = ""
        self.log = log
        self.state = ProcessState.STARTING
        self.child: Child | AdoptedProcess | None = None
        self.client: WireEngineClient | None = None
        self.parent_fd: int | None = None
        self.failures = 0
        self.restarts = 0
        self.started_at = 0.0
        self.reason = ""
        self.supervisor: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether it is, or will be, served."""
        return self.state not in (ProcessState.STOPPED, ProcessState.FAILED)

    def info(self) -> ProcessInfo:
        """Return it for people."""
        return ProcessInfo(
            engine_id=self.spec.engine_id,
            model_id=self.spec.model_id,
            state=self.state,
            pid=self.child.pid if self.child is not None and self.alive else 0,
            restarts=self.restarts,
            started_at=self.started_at,
            address=self.address,
            log=str(self.log.path),
            reason=self.reason,
        )
