"""The autoscaler in the situations that break others: bursts, slow starts, hidden queues, swinging load, full memory."""

from __future__ import annotations

import random
from itertools import pairwise
from math import pi, sin

from sagellm_control_plane.autoscaler import Autoscaler, EngineLoad, ModelLoad, StartEngine, StopEngine
from sagellm_control_plane.config import AdmissionConfig, CoreConfig
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.scaling import ScaledCluster
from sagellm_control_plane.sim.traces import SimRequest
from sagellm_control_plane.types import AutoscalerConfig

CONSTANTS = EngineConstants(max_sequences=16, per_sequence_s=0.001, step_s=0.01, load_s=20.0)
CORE = CoreConfig(admission=AdmissionConfig(max_waiting=10**9, cold_wait_s=600.0))


def arrivals(rate_at, until_s: float, seed: int = 1) -> list[SimRequest]:
    """Poisson arrivals whose rate changes with time (thinning)."""
    rng = random.Random(seed)
    top = max(rate_at(t) for t in range(int(until_s)))
    at, out = 0.0, []
    while at < until_s:
        at += rng.expovariate(top)
        if rng.random() < rate_at(at) / top:
            out.append(SimRequest(at, 400, 100))
    return out


def run(requests, **changes):
    settings = AutoscalerConfig(
        **{"min_engines": 1, "max_engines": 12, "interval_s": 2.0, "cold_start_s": 20.0, **changes}
    )
    cluster = ScaledCluster(CORE, settings, CONSTANTS)
    return cluster, cluster.serve(requests)


def test_a_day_with_a_burst_is_followed_up_and_down():
    """The fleet follows a slow wave and a sudden burst; what it costs stays well below a fleet for the peak."""
    requests = arrivals(lambda t: 6 + 5 * sin(2 * pi * t / 900) + (20 if 1200 <= t < 1320 else 0), 1800)
    cluster, result = run(requests)
    sizes = [scale.ready for scale in cluster.history]
    assert result.goodput(5.0, 0.06) > 0.9
    assert max(sizes) >= 2 * min(sizes)
    assert cluster.engine_seconds() < 0.7 * max(sizes) * result.simulated_s
    assert all(o.end_at == o.end_at for o in result.outcomes)


def test_a_slow_start_is_not_answered_by_another_one():
    """While engines load, the same demand starts no further ones."""
    cluster, _result = run(arrivals(lambda t: 12.0, 300), max_engines=40)
    loading = {scale.ready + scale.starting for scale in cluster.history if 8.0 <= scale.at <= 22.0}
    assert len(loading) == 1
    assert max(scale.ready + scale.starting for scale in cluster.history) <= 10


def test_requests_in_engines_queues_are_seen():
    """Demand beyond the slots counts although nothing waits centrally: the planner is not blind to queues."""
    scaler = Autoscaler(AutoscalerConfig(max_engines=8))
    load = ModelLoad(
        waiting=0,
        running=60,
        slots=16,
        ready=(EngineLoad(engine_id="a", running=60),),
        starting=0,
        arrivals=60,
        completions=0,
    )
    actions = scaler.decide({"m": load}, 0.0)
    assert [type(action) for action in actions] == [StartEngine] * 5


def test_a_swinging_load_does_not_make_the_fleet_swing():
    """A square wave faster than the patience changes the fleet a few times, not with every swing."""
    cluster, _result = run(arrivals(lambda t: 12.0 if int(t) // 30 % 2 else 1.0, 900), down_stable_s=90.0)
    settled = [scale.ready for scale in cluster.history if scale.at > 450.0]
    changes = sum(a != b for a, b in pairwise(settled))
    swings = 450 // 30
    assert changes <= swings / 3
    assert max(settled) - min(settled) <= 3


def test_the_engine_with_the_coldest_cache_goes_first_and_one_at_a_time():
    """Scale-in picks the fewest cached blocks, and the next one must prove its surplus anew."""
    scaler = Autoscaler(AutoscalerConfig(min_engines=1, down_stable_s=10.0))
    ready = (
        EngineLoad(engine_id="warm", running=0, cache_blocks=90),
        EngineLoad(engine_id="cold", running=0, cache_blocks=3),
    )
    load = ModelLoad(waiting=0, running=1, slots=16, ready=ready, starting=0, arrivals=0, completions=0)
    assert scaler.decide({"m": load}, 0.0) == []
    assert scaler.decide({"m": load}, 5.0) == []
    (action,) = scaler.decide({"m": load}, 10.0)
    assert isinstance(action, StopEngine)
    assert action.engine_id == "cold"
    assert scaler.decide({"m": load}, 12.0) == []


def test_an_idle_model_goes_to_zero_and_a_request_brings_it_back():
    """With a minimum of 0 the last engine stays for the idle time, then goes; demand starts one at once."""
    scaler = Autoscaler(AutoscalerConfig(min_engines=0, idle_s=100.0, down_stable_s=10.0))
    ready = (EngineLoad(engine_id="a", running=0),)

    def load(waiting=0, engines=ready):
        return {
            "m": ModelLoad(waiting=waiting, running=0, slots=4, ready=engines, starting=0, arrivals=5, completions=5)
        }

    assert scaler.decide(load(), 0.0) == []
    assert scaler.decide(load(), 90.0) == []
    assert [type(a) for a in scaler.decide(load(), 101.0)] == [StopEngine]
    assert scaler.decide(load(engines=()), 120.0) == []
    assert [type(a) for a in scaler.decide(load(waiting=1, engines=()), 121.0)] == [StartEngine]


def test_a_start_makes_room_by_stopping_what_was_idle_longest():
    """Within the memory limit another model's least recently used idle engine leaves; busy ones stay and the start waits."""
    scaler = Autoscaler(AutoscalerConfig(min_engines=0, memory_limit_bytes=100))
    idle = ModelLoad(
        waiting=0, running=0, slots=4, starting=0, arrivals=3, completions=3, memory_bytes=40,
        ready=(
            EngineLoad(engine_id="new", running=0, last_used_at=9.0, memory_bytes=40),
            EngineLoad(engine_id="old", running=0, last_used_at=2.0, memory_bytes=40),
        ),
    )  # fmt: skip
    wanted = ModelLoad(waiting=1, running=0, slots=4, ready=(), starting=0, arrivals=1, completions=0, memory_bytes=50)
    actions = scaler.decide({"idle": idle, "wanted": wanted}, 10.0)
    assert [(type(a), getattr(a, "engine_id", a.model)) for a in actions] == [
        (StopEngine, "old"),
        (StartEngine, "wanted"),
    ]
    busy = ModelLoad(
        waiting=0, running=8, slots=4, starting=0, arrivals=9, completions=1, memory_bytes=90,
        ready=(EngineLoad(engine_id="b", running=8, memory_bytes=90),),
    )  # fmt: skip
    assert [a for a in scaler.decide({"busy": busy, "wanted": wanted}, 11.0) if a.model == "wanted"] == []
