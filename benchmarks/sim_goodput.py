"""Goodput of the policies on request traces, at several loads: `python benchmarks/sim_goodput.py TRACE... --engines 8`.

Goodput is the share of all arrivals with TTFT <= 2 s and mean time per token <= 60 ms; refused and failed ones have missed. With
`--critical` a tenth of the requests is CRITICAL and their share is shown apart, among those that an idle engine could serve in time.
With `--sustained 0.9` the highest load is searched at which a policy holds that goodput, of all arrivals and of those that an idle
engine could serve in time: where a tenth of a trace is too long for any engine, no policy holds 90 % of all at any load.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec

from sagellm_control_plane.config import SLO
from sagellm_control_plane.sim.cluster import Outcome, SimResult, simulate
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.plot import goodput_svg
from sagellm_control_plane.sim.report import compare, config_named, table
from sagellm_control_plane.sim.traces import read_trace, speed_up

POLICIES = "round_robin,least_loaded,power_of_two,threshold_radix,lmetric,predicted_latency,load_balanced,adaptive"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--speeds", default="0.5,1,1.5,2,2.5,3")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--critical", action="store_true")
    parser.add_argument("--sustained", type=float, metavar="GOODPUT")
    options = parser.parse_args()
    speeds = [float(s) for s in options.speeds.split(",")]
    slo, constants = SLO(), EngineConstants()
    for path in options.traces:
        requests = read_trace(path)
        print(f"{path.name}: {len(requests)} requests, {options.engines} engines", flush=True)
        if options.critical:
            critical(requests, speeds, options.engines, slo, constants)
            continue
        if options.sustained is not None:
            for policy in options.policies.split(","):
                sustained(requests, policy, options.sustained, options.engines, slo, constants)
            continue
        rows = list(
            compare(
                requests, options.policies.split(","), speeds, engines=options.engines, slo=slo, constants=constants
            )
        )
        print(table(rows), flush=True)
        for name, folder, text in (
            ("json", options.json, msgspec.json.format(msgspec.json.encode(rows)).decode()),
            ("svg", options.plot, goodput_svg(rows)),
        ):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{path.stem}.{name}").write_text(text, encoding="utf-8")


def feasible(outcome: Outcome, slo: SLO, constants: EngineConstants) -> bool:
    """Whether an idle engine with an empty cache has the first token within nine tenths of the objective."""
    # What a step of 512 prompt tokens really takes bounds what any policy could serve in time.
    rate = constants.step_tokens / (constants.step_s + constants.step_tokens / constants.prefill_tps)
    return outcome.prompt_tokens / rate < 0.9 * slo.ttft_s


def share(result: SimResult, slo: SLO, counts: Callable[[Outcome], bool]) -> tuple[float, int]:
    """Return goodput among the outcomes that count, and how many those are."""
    rows = [o for o in result.outcomes if counts(o)]
    good = sum(o.ttft <= slo.ttft_s and o.tpot <= slo.tpot_s and not (o.failed or o.refused) for o in rows)
    return good / len(rows), len(rows)


def critical(requests, speeds, engines, slo, constants) -> None:
    rng = random.Random(1)
    for request in requests:
        request.priority = 0 if rng.random() < 0.1 else 2
    for speed in speeds:
        result = simulate(
            speed_up(requests, speed), config_named("adaptive", slo), engines=engines, constants=constants
        )
        good, count = share(result, slo, lambda o: o.priority == 0 and feasible(o, slo, constants))
        every = result.goodput(slo.ttft_s, slo.tpot_s)
        print(f"  {speed:g}x: all {every:.3f}, CRITICAL {good:.4f} of {count}", flush=True)


def sustained(requests, policy, goal, engines, slo, constants) -> None:
    """Print the highest speed-up between 1/16 and 16 at which the policy holds `goal`, to 2 %."""

    @cache
    def goodput(speed: float) -> tuple[float, float]:
        result = simulate(speed_up(requests, speed), config_named(policy, slo), engines=engines, constants=constants)
        fit, _count = share(result, slo, lambda o: feasible(o, slo, constants))
        return result.goodput(slo.ttft_s, slo.tpot_s), fit

    def highest(which: int) -> str:
        low, high = 1 / 16, 16.0
        if goodput(low)[which] < goal:
            return f"never ({goodput(low)[which]:.3f} at {low:g}x)"
        while high / low > 1.02:
            middle = (low * high) ** 0.5
            if goodput(middle)[which] >= goal:
                low = middle
            else:
                high = middle
        return f"up to {low:.2f}x"

    print(f"  {policy}: {goal:g} of all {highest(0)}, of the feasible {highest(1)}", flush=True)


if __name__ == "__main__":
    main()
