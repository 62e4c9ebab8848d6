"""The simulator against closed forms: M/M/1, M/M/c (Erlang C) and M/G/1 with processor sharing."""

from __future__ import annotations

import random
from math import factorial

import pytest

from sagellm_control_plane.config import AdmissionConfig, CoreConfig, FairnessConfig
from sagellm_control_plane.sim.cluster import simulate
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.traces import SimRequest

CONFIG = CoreConfig(
    scheduling_policy="fifo",
    routing_strategy="least_loaded",
    admission=AdmissionConfig(max_waiting=10**9, overcommit=0.0),
    fairness=FairnessConfig(enabled=False),
)
#: One request at a time, served at one second for each 100,000 prompt tokens.
SERVER = EngineConstants(
    prefill_tps=100_000.0,
    step_s=0.0,
    per_sequence_s=0.0,
    per_token_s=0.0,
    step_tokens=1 << 40,
    max_sequences=1,
    prefix_cache=False,
    n_blocks=1 << 40,
)


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival waits, for `load` = arrival rate x mean service time."""
    last = load**servers / factorial(servers) * servers / (servers - load)
    return last / (sum(load**k / factorial(k) for k in range(servers)) + last)


def exponential_work(rate: float, count: int, seed: int) -> list[SimRequest]:
    """Poisson arrivals whose service times are exponential with mean 1 s."""
    rng = random.Random(seed)
    at, out = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        out.append(SimRequest(at, max(1, round(rng.expovariate(1.0) * 100_000)), 1))
    return out


def observed(requests: list[SimRequest]) -> tuple[float, float]:
    """Arrival rate and mean service time of the sample itself: most of the sampling error cancels."""
    return len(requests) / requests[-1].at, sum(r.prompt_tokens for r in requests) / len(requests) / 100_000


@pytest.mark.parametrize(("servers", "rate"), [(1, 0.5), (4, 2.8)])
def test_exponential_servers_match_erlang_c(servers, rate):
    """Mean time in the system of M/M/1 and M/M/4 behind the central queue is within 2 % of the closed form."""
    requests = exponential_work(rate, 40_000, seed=servers)
    result = simulate(requests, CONFIG, engines=servers, constants=SERVER)
    rate, service = observed(requests)
    load = rate * service
    theory = service + erlang_c(servers, load) * service / (servers - load)
    measured = sum(o.end_at - o.at for o in result.outcomes) / len(result.outcomes)
    assert measured == pytest.approx(theory, rel=0.02)


def test_decode_batches_are_processor_sharing():
    """With steps as long as their batch, mean time in the system is that of M/G/1-PS, whatever the lengths' distribution."""
    step, mean, load, count = 1 / 2000, 500.0, 0.6, 25_000
    constants = EngineConstants(
        prefill_tps=1e15,
        step_s=0.0,
        per_sequence_s=step,
        per_token_s=0.0,
        step_tokens=1 << 40,
        max_sequences=1 << 20,
        prefix_cache=False,
        n_blocks=1 << 40,
    )
    rng = random.Random(8)
    at, requests = 0.0, []
    for _ in range(count):
        at += rng.expovariate(load / (mean * step))
        # Hyperexponential: many short ones, few long ones, squared coefficient of variation 3.
        branch = mean * (0.5 if rng.random() < 0.75 else 2.5)
        requests.append(SimRequest(at, 1, 2 + int(rng.expovariate(1 / branch))))
    result = simulate(requests, CONFIG, engines=1, constants=constants)
    service = sum(r.output_tokens - 1 for r in requests) / count * step
    load = count / requests[-1].at * service
    measured = sum(o.end_at - o.at for o in result.outcomes) / count
    assert measured == pytest.approx(service / (1 - load), rel=0.02)
