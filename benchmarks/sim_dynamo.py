"""Our simulator and routing against Dynamo's: the same trace, engines of the same constants, each by its own simulator.

    python benchmarks/sim_dynamo.py mooncake_conversation.jsonl --peer /path/to/env/bin/python

The environment of the peer is described in `sim_dynamo_peer.py`. Round robin is the same policy on both sides: what it differs by is
the difference of the two engine models. Everything else is then a difference of policies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import msgspec

from sagellm_control_plane.config import SLO
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.report import compare
from sagellm_control_plane.sim.traces import SimRequest, read_trace

ROUTERS = ("round_robin", "kv_router")
OURS = ("round_robin", "load_balanced", "adaptive")


def write_mooncake(requests: list[SimRequest], path: Path, block_size: int) -> None:
    """Write requests as Dynamo reads them; a block without a name gets one of its own."""
    serial = count(1 << 40)
    with path.open("w", encoding="utf-8") as out:
        for request in requests:
            names = [int.from_bytes(name, "big") for name in request.blocks]
            missing = -(-request.prompt_tokens // block_size) - len(names)
            line = {
                "timestamp": request.at * 1e3,
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": [*names, *(next(serial) for _ in range(missing))],
            }
            out.write(json.dumps(line) + "\n")


def peer(python: Path, job: dict[str, object]) -> Iterator[tuple[str, float, float, float]]:
    """Yield (router, speed-up, goodput, hit rate) as Dynamo has them."""
    script = Path(__file__).with_name("sim_dynamo_peer.py")
    quiet = {**os.environ, "DYN_LOG": "error"}
    done = subprocess.run(
        [python, script], input=json.dumps(job), text=True, stdout=subprocess.PIPE, check=True, env=quiet
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            yield row["router"], row["speed"], row["goodput"], row["hit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="a python that has Dynamo")
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--speeds", default="0.5,1,1.5,2,2.5,3")
    options = parser.parse_args()
    speeds = [float(part) for part in options.speeds.split(",")]
    slo, constants = SLO(), EngineConstants()
    for trace in options.traces:
        requests = read_trace(trace)
        print(f"{trace.name}: {len(requests)} requests, {options.engines} engines; goodput (prefix hits)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.jsonl")
            write_mooncake(requests, path, constants.block_size)
            job = {
                "trace": str(path),
                "engines": options.engines,
                "constants": msgspec.to_builtins(constants),
                "routers": ROUTERS,
                "speeds": speeds,
                "ttft_s": slo.ttft_s,
                "tpot_s": slo.tpot_s,
            }
            rows = [(f"Dynamo {router}", *rest) for router, *rest in peer(options.peer, job)]
        rows += [
            (f"ours {row.policy}", row.speed_up, row.goodput, row.hit_rate)
            for row in compare(requests, OURS, speeds, engines=options.engines, slo=slo, constants=constants)
        ]
        print(f"{'':<22}" + "".join(f"{f'{speed:g}x':>13}" for speed in speeds))
        for name in dict.fromkeys(row[0] for row in rows):
            cells = {speed: f"{good:.3f} ({hit:.2f})" for label, speed, good, hit in rows if label == name}
            print(f"{name:<22}" + "".join(f"{cells[speed]:>13}" for speed in speeds), flush=True)


if __name__ == "__main__":
    main()
