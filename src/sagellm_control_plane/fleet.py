"""What happens to engines: they join, change state, report, die and leave."""

from __future__ import annotations

from sagellm_control_plane import migration
from sagellm_control_plane.breaker import Breaker
from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import (
    BlocksChanged,
    BlocksSnapshot,
    Command,
    EngineDied,
    EngineJoined,
    EngineLeft,
    EngineReported,
    EngineStateChanged,
    RestartHung,
    SnapshotWanted,
)
from sagellm_control_plane.stats import Stats
from sagellm_control_plane.view import ClusterView, EngineView
from sagellm_control_plane.waiting import WaitingRoom

__all__ = ["Fleet"]


class Fleet:
    """Handles the events of engines; what waits for a model is sent, or fails, as its engines come and go."""

    def __init__(self, config: CoreConfig, view: ClusterView, waiting: WaitingRoom, stats: Stats) -> None:
        self._config = config
        self._view = view
        self._waiting = waiting
        self._stats = stats
        self._shared: set[str] = set()

    def on_tick(self, now: float) -> None:
        """Forget what engines said of others' load when they have said nothing for too long."""
        for engine_id in list(self._shared):
            engine = self._view.engines.get(engine_id)
            if engine is not None and now - engine.reported_at > self._config.health.stale_s:
                engine.forget_report()
            if engine is None or not engine.others:
                self._shared.discard(engine_id)

    def on_joined(self, event: EngineJoined, _now: float) -> list[Command]:
        """Take in an engine that is not ready yet."""
        profile = event.engine
        slots = profile.slots or self._config.default_slots
        overcommit = self._config.admission.overcommit
        limit = slots + (max(2, int(slots * overcommit)) if overcommit > 0.0 else 0)
        engine = EngineView(profile, self._config.prior, Breaker(self._config.breaker), limit)
        self._view.add(engine)
        self._view.prefix.set_capacity(engine.engine_id, profile.n_blocks or 4096)
        return []

    def on_state(self, event: EngineStateChanged, now: float) -> list[Command]:
        """The engine takes requests from now on, or does not."""
        engine = self._view.engines.get(event.engine_id)
        if engine is None:
            return []
        self._view.set_state(event.engine_id, event.state)
        if event.state != "READY":
            return self._waiting.strand(engine.model, now)
        engine.stepped_at = now
        engine.reported_steps = -1
        if event.fresh:
            engine.breaker.reset()
            self._view.prefix.clear_engine(event.engine_id)
        return self._waiting.pump(engine.model, now)

    def on_died(self, event: EngineDied, now: float) -> list[Command]:
        """The engine ended: what it had cached is gone."""
        engine = self._view.engines.get(event.engine_id)
        if engine is None:
            return []
        migration.note_death(engine, now)
        self._view.set_state(event.engine_id, "STARTING" if event.restarting else "ERROR")
        self._view.prefix.clear_engine(event.engine_id)
        return self._waiting.strand(engine.model, now)

    def on_left(self, event: EngineLeft, now: float) -> list[Command]:
        """Forget an engine."""
        engine = self._view.remove(event.engine_id)
        return self._waiting.strand(engine.model, now)

    def on_reported(self, event: EngineReported, now: float) -> list[Command]:
        """Take in its load, and notice when it makes no progress."""
        status = event.status
        engine = self._view.engines.get(status.engine_id)
        if engine is None:
            return []
        engine.note_report(status.running + status.waiting, now)
        if engine.others:
            self._shared.add(engine.engine_id)
        engine.blocks_used = status.blocks_used
        engine.blocks_cached = status.blocks_cached
        engine.adapters = status.adapters
        idle_or_loading = status.running + status.waiting == 0 or status.phase != "ready"
        if status.steps != engine.reported_steps or idle_or_loading:
            engine.reported_steps = status.steps
            engine.stepped_at = now
            return []
        idle = now - engine.stepped_at
        if idle < self._config.health.hung_s or engine.state not in ("READY", "DRAINING"):
            return []
        self._stats.hung += 1
        engine.stepped_at = now
        self._view.set_state(engine.engine_id, "ERROR")
        return [RestartHung(engine.engine_id, idle)]

    def on_blocks(self, event: BlocksChanged, _now: float) -> list[Command]:
        """Take in what changed in its prefix cache."""
        if event.engine_id not in self._view.engines:
            return []
        if self._view.prefix.apply(event.engine_id, event.sequence, event.stored, event.removed, cleared=event.cleared):
            return []
        return [SnapshotWanted(event.engine_id)]

    def on_snapshot(self, event: BlocksSnapshot, _now: float) -> list[Command]:
        """Take in all that its prefix cache holds."""
        if event.engine_id in self._view.engines:
            self._view.prefix.snapshot(event.engine_id, event.sequence, event.blocks)
        return []
