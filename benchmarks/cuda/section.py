"""One section of the run, in a process of its own: a fault of the device ends it and not the others.

    python benchmarks/cuda/section.py NAME --rows FILE [--limits JSON] [--model FILE ...] [--rehearse]

Each row is written to FILE, as a line of JSON, as soon as it is there. `run.py` starts this.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import checks
import peer
import serve
import speed
import torch
import tune
from bench import Bench, Row
from shapes import REAL, TINY

from sagellm_backend.cuda.settings import CudaSettings

RUNS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "limits": speed.limits,
    **{f"ops-{name}": part for name, part in checks.OPS.items()},
    **{f"kit-{name}": partial(checks.kit, name=name) for name in checks.KITS},
    "quality": checks.quality,
    "decode": speed.decode,
    "prefill": speed.prefill,
    "batches": speed.batches,
    "overlap": speed.overlap,
    "mix": speed.mix,
    "peer": peer.peer,
    "tune": tune.tune,
    "start": serve.start,
    "serve": serve.serve,
}


def main() -> int:
    """Run one section; what it raises is a row too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limits", type=json.loads, default={})
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        torch.set_num_threads(1)
    bench = Bench(CudaSettings.from_environment(), TINY if args.rehearse else REAL, args.model, dict(args.limits))
    with args.rows.open("a", encoding="utf-8") as out:
        try:
            for row in RUNS[args.name](bench):
                print(json.dumps({"section": args.name} | row), file=out, flush=True)
        except Exception as error:  # noqa: BLE001  whatever it was, the next section must have its turn
            traceback.print_exc()
            failed = {"section": args.name, "work": args.name, "ok": False}
            print(json.dumps(failed | {"value": f"{type(error).__name__}: {error}"[:600]}), file=out, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
