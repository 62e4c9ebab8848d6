"""The autoscaler in the simulator: the same object, engines that take their time to start, drains that lose nothing."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sagellm_control_plane.autoscaler import Autoscaler, EngineLoad, ModelLoad, StartEngine
from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import EngineJoined, EngineLeft, EngineStateChanged
from sagellm_control_plane.sim.cluster import SimCluster, SimResult
from sagellm_control_plane.sim.engine_model import EngineConstants, SimEngine
from sagellm_control_plane.sim.traces import SimRequest
from sagellm_control_plane.types import AutoscalerConfig
from sagellm_control_plane.view import EngineProfile

__all__ = ["Scale", "ScaledCluster"]


class Scale(msgspec.Struct, frozen=True):
    """Engines at one time."""

    at: float
    ready: int
    starting: int
    demand: int


class ScaledCluster(SimCluster):
    """A cluster of one model whose size the autoscaler decides."""

    def __init__(
        self,
        config: CoreConfig,
        scaling: AutoscalerConfig,
        constants: EngineConstants,
        *,
        first: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(config, (), seed=seed)
        self.autoscaler = Autoscaler(scaling)
        self.history: list[Scale] = []
        self._constants = constants
        self._names = 0
        self._starting = 0
        self._draining: set[str] = set()
        for _ in range(first):
            self._names += 1
            self._join(f"e{self._names}")

    def _profile(self, name: str) -> EngineProfile:
        constants = self._constants
        return EngineProfile(
            engine_id=name,
            model="sim",
            slots=constants.max_sequences,
            block_size=constants.block_size,
            n_blocks=constants.n_blocks,
        )

    def _join(self, name: str) -> None:
        self.engines[name] = SimEngine(name, self._constants)
        self._feed(EngineJoined(self._profile(name)))
        self._feed(EngineStateChanged(name, "READY", True))

    def _decide(self) -> None:
        state = self.state
        for name in sorted(self._draining):
            if state.view.engines[name].running == 0:
                self._draining.discard(name)
                self._feed(EngineLeft(name))
        views = [view for view in state.view.engines.values() if view.state == "READY"]
        ready = tuple(
            EngineLoad(engine_id=v.engine_id, running=v.running, cache_blocks=state.view.prefix.size(v.engine_id))
            for v in views
        )
        arrived, ended = state.arrivals_of("sim")
        load = ModelLoad(
            waiting=state.waiting(),
            running=sum(view.running for view in state.view.engines.values()),
            slots=self._constants.max_sequences,
            ready=ready,
            starting=self._starting,
            arrivals=arrived,
            completions=ended,
        )
        self.history.append(Scale(self.now, len(ready), self._starting, load.waiting + load.running))
        for action in self.autoscaler.decide({"sim": load}, self.now):
            if isinstance(action, StartEngine):
                self._names += 1
                self._starting += 1
                self._at(self.now + self._constants.load_s, self._started, f"e{self._names}", self.now)
            else:
                self._draining.add(action.engine_id)
                self._feed(EngineStateChanged(action.engine_id, "DRAINING"))
        if self._pending or len(self.history) < 2:
            self._at(self.now + self.autoscaler.config.interval_s, self._decide)

    def _started(self, name: str, began: float) -> None:
        self._starting -= 1
        self.autoscaler.note_start("sim", self.now - began)
        self._join(name)

    def serve(self, requests: Sequence[SimRequest]) -> SimResult:
        """Serve `requests` under the autoscaler."""
        self._at(0.0, self._decide)
        return self.run(requests)

    def engine_seconds(self) -> float:
        """What was paid for: READY and starting engines over time."""
        total = 0.0
        for one, other in zip(self.history, self.history[1:], strict=False):
            total += (one.ready + one.starting) * (other.at - one.at)
        return total
