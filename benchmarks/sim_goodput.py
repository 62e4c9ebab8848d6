"""Goodput of the policies on request traces, at several loads: `python benchmarks/sim_goodput.py TRACE... --engines 8`.

Goodput is the share of all arrivals with TTFT <= 2 s and mean time per token <= 60 ms; refused and failed ones have missed. With
`--critical` a tenth of the requests is CRITICAL and their share is shown apart, among those that an idle engine could serve in time.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import msgspec

from sagellm_control_plane.config import SLO
from sagellm_control_plane.sim.cluster import simulate
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
    options = parser.parse_args()
    speeds = [float(s) for s in options.speeds.split(",")]
    slo, constants = SLO(), EngineConstants()
    for path in options.traces:
        requests = read_trace(path)
        print(f"{path.name}: {len(requests)} requests, {options.engines} engines", flush=True)
        if options.critical:
            critical(requests, speeds, options.engines, slo, constants)
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


def critical(requests, speeds, engines, slo, constants) -> None:
    rng = random.Random(1)
    for request in requests:
        request.priority = 0 if rng.random() < 0.1 else 2
    # What a step of 512 prompt tokens really takes bounds what any policy could serve in time.
    rate = constants.step_tokens / (constants.step_s + constants.step_tokens / constants.prefill_tps)
    for speed in speeds:
        result = simulate(
            speed_up(requests, speed), config_named("adaptive", slo), engines=engines, constants=constants
        )
        urgent = [o for o in result.outcomes if o.priority == 0 and o.prompt_tokens / rate < 0.9 * slo.ttft_s]
        good = sum(o.ttft <= slo.ttft_s and o.tpot <= slo.tpot_s and not (o.failed or o.refused) for o in urgent)
        print(
            f"  {speed:g}x: all {result.goodput(slo.ttft_s, slo.tpot_s):.3f}, CRITICAL {good / len(urgent):.4f} of {len(urgent)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
