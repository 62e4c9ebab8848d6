"""Engines as processes of this machine: start, wait for readiness, watch, restart with a growing pause, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import ClassVar

from sagellm_control_plane.live.child import describe_exit
from sagellm_control_plane.live.engine_log import EngineLog, log_path
from sagellm_control_plane.live.engine_process import EngineProcess, ProcessInfo, ProcessOptions, ProcessState
from sagellm_control_plane.live.launch import ArgvFactory, Launcher, quoted
from sagellm_control_plane.live.lifecycle import EngineExit, EngineSpec, LifecycleListener
from sagellm_control_plane.live.processes import AdoptedProcess, is_alive, own_identity
from sagellm_control_plane.live.store import ProcessRecord, Store
from sagellm_control_plane.live.wire_client import WireEngineClient
from sagellm_protocol.errors import InvalidArgumentError, SageError, UnavailableError
from sagellm_protocol.ports import EngineClient

__all__ = ["ArgvFactory", "ProcessDriver", "ProcessInfo", "ProcessOptions", "ProcessState"]

_log = logging.getLogger(__name__)

_KILL_WAIT_S = 10.0
_DUMP_WAIT_S = 1.0
_ROTATE_EVERY_S = 5.0
_ADOPT_WAIT_S = 5.0


class ProcessDriver:
    """A `LifecycleDriver` for processes on this machine.

    Each process follows a pipe whose other end is here. Without a store it ends when this process does, however that ends. With a store
    it waits `ProcessOptions.orphan_grace_s` seconds for the next driver, which takes it over by `adopt`.

    Args:
        argv: makes the command line of an engine.
        options: directories and times.
        store: where processes and reservations are noted.
        on_change: told of every change of state, on the event loop.
    """

    borrowed: ClassVar[bool] = False

    def __init__(
        self,
        argv: ArgvFactory,
        options: ProcessOptions | None = None,
        *,
        store: Store | None = None,
        on_change: Callable[[ProcessInfo], None] | None = None,
    ) -> None:
        self._options = options or ProcessOptions.default()
        self._store = store or Store()
        self._own_store = store is None
        grace_s = self._options.orphan_grace_s if store is not None else 0.0
        self._launcher = Launcher(argv, self._options, self._store, grace_s)
        self._on_change = on_change
        self._engines: dict[str, EngineProcess] = {}
        self._rotator: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """``process``."""
        return "process"

    def processes(self) -> list[ProcessInfo]:
        """Return every engine that was started, also those that have ended."""
        return [engine.info() for engine in self._engines.values()]

    def begin(self, spec: EngineSpec) -> None:
        """Execute an engine for the `start_engine` that will come, so that it loads while its control plane is being made.

        Needs no event loop. Nothing is done where `adopt` may find engines of an earlier driver.

        Raises:
            UnavailableError: it cannot be executed.
        """
        if self._launcher.has_begun or not self._store.processes():
            self._launcher.begin(spec, self._log_of(spec.engine_id))

    def drop_begun(self) -> None:
        """End what was begun and never started. Idempotent."""
        self._launcher.drop_begun()

    async def start_engine(self, spec: EngineSpec, listener: LifecycleListener) -> EngineClient:
        """Start an engine and wait until it answers.

        A first start that fails is not tried again: its error is raised as the engine reported it.

        Raises:
            SageError: the engine's own error (`ModelFileError`, `ResourceExhaustedError`, ...).
            UnavailableError: it ended or did not answer within `spec.ready_timeout_s`; the message has its last words.
            InvalidArgumentError: an engine of that id is running.
        """
        known = self._engines.get(spec.engine_id)
        if known is not None and known.alive:
            raise InvalidArgumentError(f"engine {spec.engine_id!r} is running: choose another id", param="engine_id")
        engine = self._new(spec, listener)
        try:
            client = await self._launch(engine)
        except BaseException as exc:
            await self._end_child(engine, 0.0)
            if engine.state is ProcessState.STARTING:
                engine.reason = exc.message if isinstance(exc, SageError) else "the start was given up"
                self._give_up(engine)
            raise
        self._watch(engine)
        return client

    async def adopt(
        self, listener: LifecycleListener, found: Callable[[EngineSpec], Awaitable[None]] | None = None
    ) -> list[EngineSpec]:
        """Take over the engines of a driver on the same store that has ended; return how they were started.

        One that does not answer, or for which `found` raises `SageError`, is ended. Engines whose driver lives are left alone.
        """
        adopted = [await self._adopt(record, listener, found) for record in self._store.processes()]
        return [spec for spec in adopted if spec is not None]

    async def _adopt(
        self,
        record: ProcessRecord,
        listener: LifecycleListener,
        found: Callable[[EngineSpec], Awaitable[None]] | None,
    ) -> EngineSpec | None:
        if is_alive(record.owner):
            return None
        if not is_alive(record.identity):
            self._store.remove_process(record.engine_id)
            self._store.release(record.engine_id)
            return None
        if not self._store.claim_process(record.engine_id, record.owner, own_identity()):
            return None  # another driver was faster
        engine = self._new(record.spec, listener)
        engine.address, engine.token, engine.started_at = record.address, record.token, record.started_at
        engine.child = AdoptedProcess(record.pid, record.identity)
        engine.client = client = self._client(engine)
        try:
            await asyncio.wait_for(client.connect(), _ADOPT_WAIT_S)
            if found is not None:
                await found(record.spec)
        except (SageError, asyncio.TimeoutError) as exc:
            _log.warning("engine %s was left behind and is ended: %s", record.engine_id, exc)
            await self._end_child(engine, 0.0)
            self._store.release(record.engine_id)
            del self._engines[record.engine_id]
            return None
        self._enter(engine, ProcessState.READY)
        listener.engine_ready(record.engine_id, client, record.pid)
        self._watch(engine)
        return record.spec

    def _new(self, spec: EngineSpec, listener: LifecycleListener) -> EngineProcess:
        engine = EngineProcess(spec, listener, self._log_of(spec.engine_id))
        self._engines[spec.engine_id] = engine
        if self._rotator is None:
            self._rotator = asyncio.create_task(self._rotate_logs())
        return engine

    def _watch(self, engine: EngineProcess) -> None:
        engine.supervisor = asyncio.create_task(self._supervise(engine))
        engine.supervisor.add_done_callback(_report_bug)

    def _client(self, engine: EngineProcess) -> WireEngineClient:
        return WireEngineClient(
            engine.spec.engine_id, engine.address, token=engine.token, timeouts=self._options.timeouts
        )

    def check_stop(self, engine_id: str) -> None:
        """Any engine may be stopped."""

    async def stop_engine(self, engine_id: str, *, grace_s: float = 10.0) -> None:
        """Ask the engine to finish and end, wait `grace_s`, then kill it. No restart. Idempotent."""
        engine = self._engines.get(engine_id)
        if engine is None or not engine.alive or engine.state is ProcessState.STOPPING:
            return
        self._enter(engine, ProcessState.STOPPING)
        if engine.supervisor is not None:
            engine.supervisor.cancel()
            await asyncio.wait([engine.supervisor])
        running = engine.child is not None and not engine.child.ended
        returncode = await self._end_child(engine, grace_s)
        engine.reason = "stopped"
        self._store.release(engine_id)
        self._enter(engine, ProcessState.STOPPED)
        if running:
            self._tell_exit(engine, returncode, "stopped", None)

    async def restart_engine(self, engine_id: str) -> None:
        """Kill an engine that makes no progress; its restart policy brings it back. Its stacks go to its log first.

        Raises:
            InvalidArgumentError: no such engine is running.
        """
        engine = self._engines.get(engine_id)
        if engine is None or engine.child is None or not engine.alive:
            raise InvalidArgumentError(f"engine {engine_id!r} is not running", param="engine_id")
        child = engine.child
        child.dump()
        try:
            await child.wait(_DUMP_WAIT_S)
        except asyncio.TimeoutError:
            child.kill()
            await child.wait()

    def logs(self, engine_id: str, *, lines: int = 200) -> Sequence[str]:
        """Return the last lines that the engine wrote, also one of an earlier run."""
        engine = self._engines.get(engine_id)
        return (engine.log if engine is not None else self._log_of(engine_id)).tail(lines)

    async def close(self) -> None:
        """Stop all engines. Nothing can be started after that."""
        self.drop_begun()
        await asyncio.gather(*(self.stop_engine(engine_id) for engine_id in list(self._engines)))
        if self._rotator is not None:
            self._rotator.cancel()
            self._rotator = None
        if self._own_store:
            self._store.close()

    # one start

    async def _launch(self, engine: EngineProcess) -> EngineClient:
        spec = engine.spec
        self._enter(engine, ProcessState.STARTING)
        deadline = time.monotonic() + spec.ready_timeout_s
        await self._launcher.launch(engine)
        engine.client = client = self._client(engine)
        try:
            await asyncio.wait_for(client.connect(), max(1.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise UnavailableError(f"engine {spec.engine_id!r} is up and does not answer") from None
        assert engine.child is not None
        self._enter(engine, ProcessState.READY)
        engine.listener.engine_ready(spec.engine_id, client, engine.child.pid)
        return client

    # its life

    async def _supervise(self, engine: EngineProcess) -> None:
        """Wait for the end, tell, and start again, until the policy gives up."""
        policy = engine.spec.restart
        while True:
            assert engine.child is not None
            ready_since = time.monotonic()
            returncode = await engine.child.wait()
            await self._end_child(engine, 0.0)
            if time.monotonic() - ready_since >= policy.stable_s:
                engine.failures = 0
            reason = describe_exit(returncode) + quoted(engine.log.last_words())
            while True:
                engine.failures += 1
                engine.reason = reason
                if not policy.enabled or engine.failures > policy.max_attempts:
                    self._give_up(engine)
                    self._tell_exit(engine, returncode, reason, None)
                    return
                delay = min(policy.first_delay_s * 2 ** (engine.failures - 1), policy.max_delay_s)
                self._enter(engine, ProcessState.BACKOFF)
                self._tell_exit(engine, returncode, reason, delay)
                await asyncio.sleep(delay)
                try:
                    engine.restarts += 1
                    await self._launch(engine)
                    break
                except SageError as exc:
                    returncode, reason = await self._end_child(engine, 0.0), exc.message

    async def _end_child(self, engine: EngineProcess, grace_s: float) -> int | None:
        """End the process and what belongs to it; return its exit status."""
        child = engine.child
        if child is not None and not child.ended:
            if grace_s > 0:
                child.terminate()
            try:
                await child.wait(grace_s)
            except asyncio.TimeoutError:
                child.kill()
                await child.wait(_KILL_WAIT_S)
        if engine.parent_fd is not None:
            os.close(engine.parent_fd)
            engine.parent_fd = None
        if engine.client is not None:
            await engine.client.close()
            engine.client = None
        if engine.address.startswith("/"):
            Path(engine.address).unlink(missing_ok=True)  # noqa: ASYNC240 (one system call)
        self._store.remove_process(engine.spec.engine_id)
        return child.returncode if child is not None else None

    def _give_up(self, engine: EngineProcess) -> None:
        self._store.release(engine.spec.engine_id)
        self._enter(engine, ProcessState.FAILED)

    def _enter(self, engine: EngineProcess, state: ProcessState) -> None:
        engine.state = state
        if self._on_change is not None:
            self._on_change(engine.info())

    def _tell_exit(
        self, engine: EngineProcess, returncode: int | None, reason: str, restart_in_s: float | None
    ) -> None:
        engine.listener.engine_exited(
            EngineExit(
                engine_id=engine.spec.engine_id,
                pid=engine.child.pid if engine.child is not None else 0,
                returncode=returncode,
                reason=reason,
                restart_in_s=restart_in_s,
            )
        )

    # files

    def _log_of(self, engine_id: str) -> EngineLog:
        return EngineLog(log_path(self._options.log_dir, engine_id), self._options.log_bytes)

    async def _rotate_logs(self) -> None:
        while True:
            await asyncio.sleep(_ROTATE_EVERY_S)
            for engine in self._engines.values():
                engine.log.rotate()


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("the supervisor of an engine failed", exc_info=task.exception())
