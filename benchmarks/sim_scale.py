"""Scale of decisions: many engines, many requests, one core. `python benchmarks/sim_scale.py --engines 10000 --requests 1000000`."""

from __future__ import annotations

import argparse
import time

from sagellm_control_plane.config import AdmissionConfig, CoreConfig
from sagellm_control_plane.sim.cluster import simulate
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.traces import poisson


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--policy", default="load_balanced")
    parser.add_argument("--groups", type=int, default=20_000, help="requests of a group share half of their prompt")
    options = parser.parse_args()
    began = time.perf_counter()
    # Half of what the engines can decode: 64 output tokens at a few milliseconds each, batches of a few.
    rate = options.engines * 2.0
    requests = poisson(
        rate, options.requests, prompt_tokens=256, output_tokens=64, seed=1, groups=options.groups, block_tokens=64
    )
    made = time.perf_counter() - began
    config = CoreConfig(routing_strategy=options.policy, admission=AdmissionConfig(max_waiting=10**9))
    constants = EngineConstants(block_size=64, n_blocks=2048)
    result = simulate(requests, config, engines=options.engines, constants=constants, measure=True)
    stats = result.state.stats
    print(
        f"{options.engines} engines, {options.requests} requests, policy {options.policy}: {result.wall_s:.0f} s, "
        f"{result.cpu_s:.0f} s of CPU time (and {made:.0f} s to make the requests), {result.placement_us:.1f} us a placement, "
        f"{result.decision_us:.1f} us of the core for each request, "
        f"{result.events} events, hit rate {stats.hit_tokens / stats.prompt_tokens:.2f}, completed {stats.completed}, "
        f"goodput {result.goodput(2.0, 0.06):.3f}"
    )


if __name__ == "__main__":
    main()
