"""One start of an engine process: executed now or begun before, and what it reports before it serves."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import msgspec

from sagellm_control_plane.live.child import Child, describe_exit
from sagellm_control_plane.live.engine_log import EngineLog
from sagellm_control_plane.live.engine_process import EngineProcess, ProcessOptions
from sagellm_control_plane.live.execution import ArgvFactory, Execution, Executor
from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.live.store import Store
from sagellm_protocol.errors import SageError, UnavailableError
from sagellm_protocol.wire import StartReport

__all__ = ["ArgvFactory", "Launcher", "quoted"]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A process that waits for its launch."""

    spec: EngineSpec
    log: EngineLog
    execution: Execution


class Launcher:
    """Starts processes, and notes them and what they reserve in the store.

    Args:
        argv: makes the command line of an engine.
        options: directories and ports.
        store: where processes and reservations are noted.
        orphan_grace_s: seconds that a process outlives this one.
    """

    def __init__(self, argv: ArgvFactory, options: ProcessOptions, store: Store, orphan_grace_s: float) -> None:
        self._executor = Executor(argv, options, store, orphan_grace_s)
        self._begun: dict[str, _Begun] = {}

    def begin(self, spec: EngineSpec, log: EngineLog) -> None:
        """Execute an engine for the `launch` that will come. Needs no event loop.

        Raises:
            UnavailableError: it cannot be executed.
        """
        self._begun[spec.engine_id] = _Begun(spec, log, self._executor.execute(spec, log))

    @property
    def has_begun(self) -> bool:
        """Whether a process waits for its launch."""
        return bool(self._begun)

    def drop_begun(self) -> None:
        """End what was begun and never launched. Idempotent."""
        while self._begun:
            engine_id, begun = self._begun.popitem()
            begun.execution.end()
            self._executor.forget(engine_id)

    async def launch(self, engine: EngineProcess) -> None:
        """Start the process, unless it was begun, and wait until it says that it serves.

        Raises:
            SageError: the engine's own error, or how it ended; the message has its last words.
            UnavailableError: it was not ready in time, or cannot be started.
        """
        spec = engine.spec
        execution = self._claim(engine) or self._executor.execute(spec, engine.log)
        engine.child = Child(execution.process)
        engine.parent_fd = execution.parent_fd
        engine.address, engine.token, engine.started_at = execution.address, execution.token, execution.started_at
        try:
            line = await asyncio.wait_for(_read_line(execution.status_fd), spec.ready_timeout_s)
        except asyncio.TimeoutError:
            raise UnavailableError(
                f"engine {spec.engine_id!r} was not ready within {spec.ready_timeout_s:g} s{quoted(engine.log.last_words())}"
            ) from None
        finally:
            os.close(execution.status_fd)
        await _check_report(engine, line)

    def _claim(self, engine: EngineProcess) -> Execution | None:
        """Return what was begun for this engine, or None; what was begun for another configuration is ended."""
        begun = self._begun.pop(engine.spec.engine_id, None)
        if begun is None:
            return None
        if msgspec.structs.replace(begun.spec, restart=engine.spec.restart) != engine.spec:
            begun.execution.end()
            return None
        engine.log = begun.log
        return begun.execution


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
