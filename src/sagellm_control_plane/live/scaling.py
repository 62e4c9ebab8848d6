"""Acts on the autoscaler's decisions through the lifecycle driver; loads models on demand."""

from __future__ import annotations

import asyncio
import logging
import time

from sagellm_control_plane.autoscaler import Autoscaler, EngineLoad, ModelLoad, ScaleAction, StartEngine
from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.engines import Engines
from sagellm_control_plane.live.registry import Engine
from sagellm_control_plane.types import AutoscalerConfig, EngineState
from sagellm_protocol.errors import SageError, UnavailableError

__all__ = ["Scaling"]

_log = logging.getLogger(__name__)

_DEFAULT_SLOTS = 16
#: Seconds that the first engine of a model waits for the memory of busy ones.
_ROOM_S = 20.0


class Scaling:
    """A task that asks the autoscaler at an interval, and does what it says."""

    def __init__(self, dispatcher: Dispatcher, engines: Engines, config: AutoscalerConfig) -> None:
        self.autoscaler = Autoscaler(config)
        self.last_actions: list[str] = []
        self._dispatcher = dispatcher
        self._engines = engines
        self._interval_s = config.interval_s
        self._task: asyncio.Task[None] | None = None
        self._starting: dict[str, int] = {}
        self._actions: set[asyncio.Task[None]] = set()
        self._ensuring: dict[str, asyncio.Task[None]] = {}
        self._memory: dict[str, int] = {}
        self._slots: dict[str, int] = {}

    def start(self) -> None:
        """Begin to scale."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="control-plane-scaling")

    async def stop(self) -> None:
        """End; starts under way are given up."""
        tasks = [task for task in (self._task, *self._actions, *self._ensuring.values()) if task is not None]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ensure(self, model: str) -> None:
        """Wait until some engine of a startable model is READY, starting one if none is there or on its way.

        Raises:
            SageError: it could not be started.
        """
        if not self._engines.startable(model) or self._dispatcher.state.view.ready.get(model):
            return
        if any(e.info.state is EngineState.STARTING for e in self._dispatcher.registry.of_model(model)):
            task = self._ensuring.get(model)
            if task is None:
                return  # a restart: the core says how long requests wait for it
        else:
            task = self._ensuring.get(model)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._make_room_and_start(model))
                self._ensuring[model] = task
                task.add_done_callback(lambda _task: self._ensuring.pop(model, None))
        await asyncio.shield(task)

    async def _make_room_and_start(self, model: str) -> None:
        """The first engine of a model: others may have to leave for it, and it waits for those that are busy."""
        patience = time.monotonic() + _ROOM_S
        while True:
            loads = self.loads()
            loads[model] = ModelLoad(
                waiting=1, running=0, slots=self._slots_of(model), ready=(), starting=0, arrivals=0, completions=0,
                memory_bytes=self._memory_of_next(model),
            )  # fmt: skip
            actions = self.autoscaler.within_memory([StartEngine(model, "a request asks for it")], loads)
            for action in actions:
                if not isinstance(action, StartEngine):
                    await self._stop_engine(action.engine_id)
            if any(isinstance(action, StartEngine) for action in actions):
                break
            if time.monotonic() > patience:
                raise UnavailableError(
                    f"no engine of model {model!r} fits beside those that are busy: about {loads[model].memory_bytes >> 20} MiB are "
                    f"needed, the limit for all is {self.autoscaler.config.memory_limit_bytes >> 20} MiB; try again, or raise it",
                    retry_after_s=5.0,
                )
            await asyncio.sleep(self._interval_s)
        await self._start_engine(model)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            for action in self.autoscaler.decide(self.loads(), self._dispatcher.clock()):
                self._act(action)

    def _act(self, action: ScaleAction) -> None:
        _log.info("autoscaler: %s", action)
        self.last_actions = [*self.last_actions[-19:], str(action)]
        task = asyncio.get_running_loop().create_task(self._quietly(action))
        self._actions.add(task)
        task.add_done_callback(self._actions.discard)

    async def _quietly(self, action: ScaleAction) -> None:
        try:
            if isinstance(action, StartEngine):
                await self._start_engine(action.model)
            else:
                await self._stop_engine(action.engine_id)
        except SageError as error:
            _log.warning("autoscaler: %s", error.message)

    async def _start_engine(self, model: str) -> None:
        self._starting[model] = self._starting.get(model, 0) + 1
        began = time.monotonic()
        try:
            await self._engines.start_managed(model, None, {})
        finally:
            self._starting[model] -= 1
        self.autoscaler.note_start(model, time.monotonic() - began)

    async def _stop_engine(self, engine_id: str) -> None:
        await self._engines.stop_gracefully(engine_id, 30.0)
        if self._dispatcher.registry.find(engine_id) is not None:
            self._dispatcher.forget(engine_id)

    def loads(self) -> dict[str, ModelLoad]:
        """Return every model that we may start engines for, as the autoscaler sees it."""
        models = {e.info.model_id for e in self._dispatcher.registry.all() if e.spec is not None}
        return {model: self._load_of(model) for model in models | set(self._starting)}

    def _load_of(self, model: str) -> ModelLoad:
        state = self._dispatcher.state
        managed = [e for e in self._dispatcher.registry.of_model(model) if e.spec is not None]
        views = state.view.engines
        ready = []
        for engine in managed:
            view = views.get(engine.info.engine_id)
            if engine.info.state is not EngineState.READY or view is None:
                continue
            self._slots[model] = view.profile.slots or _DEFAULT_SLOTS
            self._memory[model] = _reported_memory(engine) or max(
                _described_memory(engine), self._memory_of_next(model)
            )
            ready.append(
                EngineLoad(
                    engine_id=engine.info.engine_id,
                    running=view.running,
                    cache_blocks=state.view.prefix.size(engine.info.engine_id),
                    last_used_at=view.busy_since,
                    memory_bytes=self._memory[model],
                )
            )
        starting = sum(e.info.state is EngineState.STARTING for e in managed)
        arrived, ended = state.arrivals_of(model)
        return ModelLoad(
            waiting=state.waiting(model),
            running=sum(view.running for view in views.values() if view.model == model),
            slots=self._slots_of(model),
            ready=tuple(ready),
            starting=starting,
            arrivals=arrived,
            completions=ended,
            memory_bytes=self._memory_of_next(model),
        )

    def _memory_of_next(self, model: str) -> int:
        """Bytes that another engine of the model will take; one that never ran is taken to be as large as the largest that did."""
        return self._memory.get(model, max(self._memory.values(), default=0))

    def _slots_of(self, model: str) -> int:
        return self._slots.get(model, _DEFAULT_SLOTS)

    def status(self) -> dict[str, object]:
        """Return the autoscaler's state as plain data."""
        loads = self.loads()
        return {
            "enabled": True,
            "starts": self.autoscaler.starts,
            "stops": self.autoscaler.stops,
            "last_actions": self.last_actions,
            "models": {
                model: {
                    "desired": self.autoscaler.desired(model),
                    "ready": len(load.ready),
                    "starting": load.starting,
                    "waiting": load.waiting,
                    "running": load.running,
                }
                for model, load in loads.items()
            },
        }


def _reported_memory(engine: Engine) -> int:
    """Resident bytes as last reported, 0 before the first report."""
    return engine.status.rss_bytes if engine.status is not None else 0


def _described_memory(engine: Engine) -> int:
    """What the engine said about weights and KV: less than it takes."""
    known = engine.description
    return known.weight_bytes + known.block_bytes * known.n_blocks if known is not None else 0
