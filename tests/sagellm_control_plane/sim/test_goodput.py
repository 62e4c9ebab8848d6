"""The default against the other policies, from an idle cluster to one with twice the work that it can do."""

from __future__ import annotations

import random

import pytest

from sagellm_control_plane.config import SLO
from sagellm_control_plane.sim.cluster import SimResult, simulate
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.report import config_named
from sagellm_control_plane.sim.traces import poisson

OBJECTIVE = SLO()
OTHERS = ("round_robin", "least_loaded", "power_of_two", "threshold_radix", "lmetric", "predicted_latency")


def run(policy: str, rate: float, groups: int) -> SimResult:
    requests = poisson(rate, 1200, prompt_tokens=3000, output_tokens=100, seed=2, groups=groups, block_tokens=512)
    rng = random.Random(1)
    for request in requests:
        request.priority = 0 if rng.random() < 0.1 else 2
    return simulate(requests, config_named(policy, OBJECTIVE), engines=4, constants=EngineConstants())


def goodput(result: SimResult, band: int | None = None) -> float:
    return result.goodput(OBJECTIVE.ttft_s, OBJECTIVE.tpot_s, band)


@pytest.mark.parametrize("groups", [0, 60], ids=["nothing shared", "shared prefixes"])
@pytest.mark.parametrize("rate", [6.0, 12.0, 18.0, 36.0])
def test_the_default_is_the_best_or_within_two_points_at_every_load(rate, groups):
    """No strategy beats the default by more than 2 points, idle or overloaded, with and without prefixes to find."""
    best = max(goodput(run(policy, rate, groups)) for policy in OTHERS)
    assert goodput(run("adaptive", rate, groups)) >= best - 0.02


@pytest.mark.parametrize("groups", [0, 60], ids=["nothing shared", "shared prefixes"])
def test_overload_is_refused_from_below(groups):
    """With twice the work that can be done, more than half of it is done in time, and nearly all of what is CRITICAL."""
    result = run("adaptive", 36.0, groups)
    assert goodput(result) > 0.5
    assert goodput(result, 0) > 0.95
    assert goodput(run("load_balanced", 36.0, groups)) < 0.2
