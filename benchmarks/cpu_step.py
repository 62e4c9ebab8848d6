"""Engine steps of the cpu backend without an engine around them: prefill and decode rates, and their share of the limits.

    python benchmarks/cpu_step.py MODEL.gguf [--quant q8] [--threads 2] [--isa avx2] [--json out.json]

Decode: one token for each of B sequences whose context grows from 32 to 32 + STEPS. Prefill: chunks of 512 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from sagellm_backend.base import LoadOptions, RowSampling, Runner, StepBatch
from sagellm_backend.cpu import CpuBackend
from sagellm_backend.cpu.limits import measure_limits
from sagellm_core.loader import open_model
from sagellm_protocol.sampling import SamplingParams

GREEDY = RowSampling(SamplingParams(temperature=0.0))
BLOCKS_EACH = 16


def step(runner: Runner, ids: np.ndarray, starts: list[int], lengths: list[int], tables: np.ndarray) -> np.ndarray:
    ends = np.cumsum(lengths).astype(np.int32) - 1
    batch = StepBatch(
        token_ids=np.asarray(ids, np.int32),
        starts=np.asarray(starts, np.int32),
        lengths=np.asarray(lengths, np.int32),
        block_tables=tables,
        logit_rows=ends,
        sampling=[GREEDY] * len(lengths),
    )
    return runner.step(batch).token_ids


def prefill(runner: Runner, length: int, chunk: int = 512) -> float:
    """Tokens a second over one prompt."""
    ids = np.random.default_rng(length).integers(100, 30000, length)
    table = np.arange(-(-length // 16), dtype=np.int32)[None]
    start = time.perf_counter()
    for i in range(0, length, chunk):
        part = ids[i : i + chunk]
        step(runner, part, [i], [len(part)], table)
    return length / (time.perf_counter() - start)


def decode(runner: Runner, streams: int, steps: int) -> float:
    """Tokens a second of all streams together, by the median step."""
    rng = np.random.default_rng(streams)
    tables = np.arange(streams * BLOCKS_EACH, dtype=np.int32).reshape(streams, BLOCKS_EACH)
    for s in range(0, streams, 16):
        n = min(16, streams - s)
        step(runner, rng.integers(100, 30000, 32 * n), [0] * n, [32] * n, tables[s : s + n])
    ids = rng.integers(100, 30000, streams)
    times = []
    for i in range(steps):
        start = time.perf_counter()
        ids = step(runner, ids, [32 + i] * streams, [1] * streams, tables)
        times.append(time.perf_counter() - start)
    return streams / statistics.median(times)


def measure(runner: Runner, rounds: int, steps: int) -> dict[str, float]:
    """Median of each work over `rounds` interleaved rounds."""
    works = {f"prefill {n}": lambda n=n: prefill(runner, n) for n in (512, 2048)}
    works |= {f"decode x{n}": lambda n=n: decode(runner, n, steps) for n in (1, 2, 4, 8, 16, 32)}
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            rates[name].append(work())
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--isa", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.isa:
        os.environ["SAGELLM_CPU_ISA"] = args.isa
    model = open_model(args.model)
    options = LoadOptions(n_blocks=32 * BLOCKS_EACH, threads=args.threads, quant=args.quant, kv_dtype=args.kv)
    runner = CpuBackend().load(model.spec, model.weights, options)
    rates = measure(runner, args.rounds, args.steps)
    limits = measure_limits(args.threads, args.isa)
    ceiling = limits.read_bytes_per_s / runner.weight_bytes
    print(
        f"{CpuBackend().capability().instruction_set}, weights {runner.weight_bytes / 1e6:.0f} MB, one stream's ceiling {ceiling:.0f} tok/s"
    )
    for name, rate in rates.items():
        print(
            f"{name:14} {rate:8.0f} tok/s" + (f"  {rate / ceiling:.0%} of the ceiling" if name == "decode x1" else "")
        )
    if args.json:
        args.json.write_text(
            json.dumps({"rates": rates, "ceiling": ceiling, "weight_bytes": runner.weight_bytes}, indent=1)
        )


if __name__ == "__main__":
    main()
