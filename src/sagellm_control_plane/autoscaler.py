"""How many engines each model should have: a forecast as floor, a reaction to what is there, and patience against swinging.

Demand is concurrency: requests on engines and waiting for them, so that a queue is never invisible. By Little's law the forecast is
the arrival rate that a level-and-trend smoothing (Holt, 1957) expects when an engine started now would be ready, times what a
request occupies. Engines that are starting count as capacity, so that a slow start is not answered by another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import msgspec

from sagellm_control_plane.types import AutoscalerConfig

__all__ = ["Autoscaler", "AutoscalerConfig", "EngineLoad", "ModelLoad", "ScaleAction", "StartEngine", "StopEngine"]


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One READY engine that may be stopped."""

    engine_id: str
    running: int
    cache_blocks: int = 0
    last_used_at: float = 0.0
    memory_bytes: int = 0


class ModelLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One model now.

    Attributes:
        waiting: requests held centrally.
        running: requests on engines, those in engines' own queues included.
        slots: sequences that one engine runs at once.
        ready: engines that serve.
        starting: engines on their way.
        arrivals: requests since the start of time; only grows.
        completions: requests that ended since then.
        memory_bytes: what one more engine takes.
    """

    waiting: int
    running: int
    slots: int
    ready: tuple[EngineLoad, ...]
    starting: int
    arrivals: int
    completions: int
    memory_bytes: int = 0


class StartEngine(msgspec.Struct, frozen=True):
    """Start one more engine for a model."""

    model: str
    reason: str


class StopEngine(msgspec.Struct, frozen=True):
    """Drain and stop an engine."""

    model: str
    engine_id: str
    reason: str


ScaleAction = StartEngine | StopEngine


class _Model:
    """Memory of one model between decisions."""

    def __init__(self) -> None:
        self.arrivals = 0
        self.at: float | None = None
        self.level = 0.0
        self.trend = 0.0
        self.served_s = 0.0
        self.completions = 0
        self.completed = 0.0
        self.short_since: float | None = None
        self.surplus_since: float | None = None
        self.busy_at: float | None = None
        self.desired = 0
        self.cold_start_s = 0.0

    @property
    def occupancy_s(self) -> float | None:
        """Seconds for which a request occupies a slot, by Little's law; None before one has ended."""
        return self.served_s / self.completed if self.completed > 0.5 else None


class Autoscaler:
    """Decides; whoever owns a lifecycle driver acts."""

    LEVEL, TREND = 0.4, 0.2
    DRAIN_S = 15.0
    TREND_LIMIT = 1.5

    def __init__(self, config: AutoscalerConfig) -> None:
        self.config = config
        self._models: dict[str, _Model] = {}
        self.starts = 0
        self.stops = 0

    def note_start(self, model: str, seconds: float) -> None:
        """Learn how long an engine of the model took to become ready."""
        memory = self._models.setdefault(model, _Model())
        memory.cold_start_s = seconds if not memory.cold_start_s else 0.5 * (memory.cold_start_s + seconds)

    def desired(self, model: str) -> int:
        """Engines that the last decision wanted for a model."""
        memory = self._models.get(model)
        return memory.desired if memory is not None else 0

    def decide(self, loads: Mapping[str, ModelLoad], now: float) -> list[ScaleAction]:
        """Return what to start and stop, for all models, at `now` (seconds)."""
        actions: list[ScaleAction] = []
        for model, load in loads.items():
            memory = self._models.setdefault(model, _Model())
            self._observe(memory, load, now)
            memory.desired = self._want(memory, load, now)
            actions += self._act(model, memory, load, now)
        actions = self.within_memory(actions, loads)
        self.starts += sum(isinstance(action, StartEngine) for action in actions)
        self.stops += sum(isinstance(action, StopEngine) for action in actions)
        return actions

    def _observe(self, memory: _Model, load: ModelLoad, now: float) -> None:
        if load.waiting + load.running or memory.at is None or load.arrivals != memory.arrivals:
            memory.busy_at = now
        if memory.at is not None and now > memory.at:
            gap = now - memory.at
            rate = (load.arrivals - memory.arrivals) / gap
            previous = memory.level or rate
            memory.level = self.LEVEL * rate + (1 - self.LEVEL) * (previous + memory.trend * gap)
            memory.level = max(memory.level, 0.0)
            memory.trend = self.TREND * (memory.level - previous) / gap + (1 - self.TREND) * memory.trend
            served = min(load.running, load.slots * len(load.ready))
            memory.served_s = 0.95 * memory.served_s + served * gap
            memory.completed = 0.95 * memory.completed + (load.completions - memory.completions)
        memory.arrivals, memory.completions, memory.at = load.arrivals, load.completions, now

    def _want(self, memory: _Model, load: ModelLoad, now: float) -> int:
        config = self.config
        ahead = memory.cold_start_s or config.cold_start_s
        occupancy = memory.occupancy_s
        demand = float(load.running + load.waiting)
        if occupancy is not None:
            # What is there beyond the lasting concurrency is work to be done once, in about the time that a start takes.
            excess = max(demand - memory.level * occupancy, 0.0)
            backlog = excess * min(occupancy / max(ahead, self.DRAIN_S), 1.0)
            # The trend of a burst overshoots: it may add half of the present rate.
            rate = min(max(memory.level + memory.trend * ahead, 0.0), self.TREND_LIMIT * memory.level)
            demand = rate * occupancy + backlog
        wanted = ceil(demand / (load.slots * config.target_load) - 1e-9) if demand > 0.0 else 0
        idle = now - memory.busy_at if memory.busy_at is not None else 0.0
        floor = config.min_engines
        if wanted == 0 and floor == 0 and idle < config.idle_s:
            floor = min(1, len(load.ready) + load.starting)
        return min(max(wanted, floor), config.max_engines)

    def _act(self, model: str, memory: _Model, load: ModelLoad, now: float) -> list[ScaleAction]:
        config = self.config
        have = len(load.ready) + load.starting
        if memory.desired > have:
            memory.surplus_since = None
            memory.short_since = now if memory.short_since is None else memory.short_since
            queued = load.waiting > 0 or load.running > load.slots * max(len(load.ready), 1) or have == 0
            if queued or now - memory.short_since >= config.up_stable_s:
                reason = f"demand {load.running + load.waiting} on {len(load.ready)} engines of {load.slots} slots"
                return [StartEngine(model, reason)] * (memory.desired - have)
            return []
        memory.short_since = None
        if memory.desired == have or load.starting or load.waiting:
            memory.surplus_since = None
            return []
        memory.surplus_since = now if memory.surplus_since is None else memory.surplus_since
        last = len(load.ready) == 1
        patience = 0.0 if last and config.min_engines == 0 else config.down_stable_s
        if now - memory.surplus_since < patience or not load.ready:
            return []
        # One at a time; the next one has to prove its surplus anew.
        memory.surplus_since = now
        coldest = min(load.ready, key=lambda engine: (engine.cache_blocks, engine.running, engine.engine_id))
        return [StopEngine(model, coldest.engine_id, f"surplus for {patience:.0f} s, coldest cache")]

    def within_memory(self, actions: list[ScaleAction], loads: Mapping[str, ModelLoad]) -> list[ScaleAction]:
        """Make room for starts by stopping idle engines of other models, least recently used first; else put them off."""
        limit = self.config.memory_limit_bytes
        if not limit or not any(isinstance(action, StartEngine) for action in actions):
            return actions
        stopping = {action.engine_id for action in actions if isinstance(action, StopEngine)}
        used = sum(e.memory_bytes for load in loads.values() for e in load.ready if e.engine_id not in stopping)
        used += sum(load.starting * load.memory_bytes for load in loads.values())
        out: list[ScaleAction] = []
        for action in actions:
            if isinstance(action, StartEngine):
                need = loads[action.model].memory_bytes
                for victim, model in _idle_engines(loads, action.model):
                    if used + need <= limit:
                        break
                    if victim.engine_id not in stopping:
                        stopping.add(victim.engine_id)
                        used -= victim.memory_bytes
                        out.append(StopEngine(model, victim.engine_id, f"its memory is needed for {action.model}"))
                if used + need > limit:
                    continue
                used += need
            out.append(action)
        return out


def _idle_engines(loads: Mapping[str, ModelLoad], wanted: str) -> list[tuple[EngineLoad, str]]:
    found = [
        (engine, model)
        for model, load in loads.items()
        if model != wanted and not load.waiting
        for engine in load.ready
        if not engine.running
    ]
    return sorted(found, key=lambda pair: pair[0].last_used_at)
