"""Active health checks: asks every engine how it is, and tells the driver what that means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sagellm_control_plane.config import HealthConfig
from sagellm_control_plane.events import EngineReported, Tick
from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.registry import Engine
from sagellm_control_plane.types import EngineState
from sagellm_protocol.errors import SageError, UnavailableError

__all__ = ["Prober"]


class Prober:
    """One task that probes all engines at an interval, and single probes on demand."""

    def __init__(self, dispatcher: Dispatcher, config: HealthConfig, wall_clock: Callable[[], float]) -> None:
        self._dispatcher = dispatcher
        self._config = config
        self._wall_clock = wall_clock
        self._task: asyncio.Task[None] | None = None
        self._single: dict[str, asyncio.Task[None]] = {}
        self.on_round: Callable[[], None] = lambda: None

    @property
    def running(self) -> bool:
        """Whether it has been started, and not stopped."""
        return self._task is not None

    def start(self) -> None:
        """Begin to probe, all that are there at once."""
        self._probe_all()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="control-plane-probes")

    async def settle(self, timeout_s: float) -> None:
        """Wait until the single probes under way have ended, at most `timeout_s` seconds."""
        if self._single:
            await asyncio.wait(list(self._single.values()), timeout=timeout_s)

    async def stop(self) -> None:
        """End all probes."""
        tasks = [task for task in (self._task, *self._single.values()) if task is not None]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def soon(self, engine_id: str) -> None:
        """Probe one engine now, unless that is under way."""
        if engine_id in self._single:
            return
        engine = self._dispatcher.registry.find(engine_id)
        if engine is None:
            return
        task = asyncio.get_running_loop().create_task(self._probe(engine))
        self._single[engine_id] = task
        task.add_done_callback(lambda _task: self._single.pop(engine_id, None))

    def _probe_all(self) -> None:
        for engine in self._dispatcher.registry.all():
            self.soon(engine.info.engine_id)

    async def _run(self) -> None:
        config = self._config
        while True:
            await asyncio.sleep(config.interval_s)
            self._probe_all()
            await self.settle(config.timeout_s * 2)
            self.on_round()
            self._dispatcher.fail_stalled(self._dispatcher.clock(), config.stall_s)
            self._dispatcher.feed(Tick())

    async def _probe(self, engine: Engine) -> None:
        state = engine.info.state
        if state is EngineState.STOPPED or engine.client is None:
            return
        try:
            if engine.description is None:
                engine.description = await asyncio.wait_for(engine.client.describe(), self._config.timeout_s)
            status = await asyncio.wait_for(engine.client.status(), self._config.timeout_s)
        except asyncio.TimeoutError:
            self._missed(engine, UnavailableError(f"no answer within {self._config.timeout_s:.1f} s"))
            return
        except SageError as error:
            self._missed(engine, error)
            return
        engine.status = status
        engine.missed_probes = 0
        engine.info.last_heartbeat = self._wall_clock()
        self._answered(engine)

    def _answered(self, engine: Engine) -> None:
        info = engine.info
        if engine.status is None or engine.client is None:
            return
        waits_for_driver = engine.spec is not None and info.state is EngineState.STARTING
        if info.state in (EngineState.STARTING, EngineState.ERROR) and not waits_for_driver and not engine.hung:
            info.consecutive_failures = 0
            self._dispatcher.engine_ready(engine, engine.client, fresh=False)
        self._dispatcher.feed(EngineReported(engine.status))

    def _missed(self, engine: Engine, error: SageError) -> None:
        engine.missed_probes += 1
        engine.info.consecutive_failures += 1
        engine.info.last_error = error.message
        healthy = engine.info.state in (EngineState.READY, EngineState.DRAINING)
        # After a request saw it die, one missed probe is proof enough; otherwise a few in a row.
        if (healthy and engine.missed_probes >= self._config.failures) or (
            engine.info.state is EngineState.ERROR and engine.missed_probes == 1
        ):
            self._dispatcher.engine_died(engine.info.engine_id, error.message)
