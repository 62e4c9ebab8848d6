"""Prefill and decode on two engines, as a policy of the simulated cluster: where it wins, and that it does not lose elsewhere."""

from __future__ import annotations

import pytest

from sagellm_control_plane.config import SLO, AdmissionConfig, CoreConfig
from sagellm_control_plane.sim.cluster import SimResult, simulate
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.faults import parse_faults
from sagellm_control_plane.sim.traces import poisson
from sagellm_control_plane.types import PDSeparationConfig

OBJECTIVE = SLO(ttft_s=2.0, tpot_s=0.03)
FAST = PDSeparationConfig(kv_bytes_per_token=100_000, transfer_bytes_per_s=10e9)
SLOW = PDSeparationConfig(kv_bytes_per_token=100_000, transfer_bytes_per_s=1e8)
# Large chunks: a step with prefill takes 0.13 s, and everybody who decodes there waits for it.
CONSTANTS = EngineConstants(step_tokens=2048)


def run(pd: PDSeparationConfig | None, *, rate: float, prompt: int, output: int, faults: str = "") -> SimResult:
    config = CoreConfig(slo=OBJECTIVE, admission=AdmissionConfig(max_waiting=10**9), pd=pd)
    requests = poisson(rate, 1000, prompt_tokens=prompt, output_tokens=output, seed=5)
    return simulate(requests, config, engines=4, constants=CONSTANTS, faults=parse_faults(faults, 4))


def goodput(result: SimResult) -> float:
    return result.goodput(OBJECTIVE.ttft_s, OBJECTIVE.tpot_s)


@pytest.mark.parametrize("rate", [8.0, 10.0])
def test_split_wins_where_prefill_would_hold_up_decode(rate):
    """Long prompts, long outputs and a tight pace: with a fast link more requests meet both objectives than unsplit."""
    split, whole = (run(pd, rate=rate, prompt=4000, output=200) for pd in (FAST, None))
    assert split.state.stats.splits > 500
    assert goodput(split) > goodput(whole) + 0.02


@pytest.mark.parametrize(("rate", "prompt", "output"), [(60.0, 300, 400), (8.0, 4000, 200), (4.0, 8000, 30)])
def test_a_slow_link_costs_little(rate, prompt, output):
    """Where moving the blocks does not pay, requests go unsplit, and goodput is that of engines that know of no roles."""
    split, whole = (run(pd, rate=rate, prompt=prompt, output=output) for pd in (SLOW, None))
    assert split.state.stats.splits < 250
    assert goodput(split) >= goodput(whole) - 0.03


def test_the_death_of_an_engine_for_prefill_loses_nothing():
    """When engines that compute prompts crash, all requests end with all their tokens; the rest go unsplit or to the others."""
    result = run(FAST, rate=8.0, prompt=4000, output=200, faults="crash:e0@20=0,crash:e1@30=20")
    assert result.state.stats.splits > 100
    assert not any(o.failed or o.refused for o in result.outcomes)
    assert all(o.end_at >= o.first_at >= o.at for o in result.outcomes)
    assert result.state.ledger.open == 0
