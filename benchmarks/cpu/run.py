"""`make bench`: isagellm and its peers on the same weights, interleaved in one run on this machine.

Each round runs every contender once, one at a time, in fresh processes: A B C, C B A, A B C, ... A row's number is the median over
the rounds; the ratio is taken round by round against a peer of the same round, so that a noisy neighbour hits both sides.

    python benchmarks/cpu/run.py                                    # everything: the table, its JSON, a plot for each part
    python benchmarks/cpu/run.py --parts q8,bf16 --rounds 3
    python benchmarks/cpu/run.py --parts bf16 --peers llama.cpp,vllm
    python benchmarks/cpu/run.py --parts q4 --rows decode,http1

Parts are files (rows.py); the file of a format is a requantised copy of the stored model, the same for everybody. `kl` compares
our divergence from float32 with llama.cpp's (quality.py). Peers get virtual environments of their own on first use (peers.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from pathlib import Path

import peers as peers_
import quality
from report import table, write_plot
from requantise import requantise
from rows import PARTS, ROWS, Part
from turns import Job, LeftOut, Vllm, turn

from sagellm import store

KL = "kl"


def model_of(part: Part) -> Path:
    """The stored model, or its copy in the part's format, made on first use."""
    stored = store.resolve(part.model).path
    if not part.format:
        return stored
    target = peers_.home().parent / "bench-models" / f"{part.model.partition(':')[0]}.{part.format}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        requantise(stored, part.format, target)
    return target


def run_part(key: str, args: argparse.Namespace, save) -> dict:
    """Run the rounds of one part; `save` is called after each."""
    part = PARTS[key]
    rows = frozenset(args.rows or part.rows)
    job = Job(str(args.model or model_of(part)), args.threads, rows)
    contenders = ["isagellm", *(peer for peer in part.peers if peer in args.peers)]
    result = {"title": part.title, "model": Path(job.model).name, "rounds": [], "left_out": {}}
    vllm: Vllm | None = None
    try:
        for number in range(args.rounds):
            results: dict[str, dict[str, float]] = {}
            for name in contenders if number % 2 == 0 else contenders[::-1]:
                if name in result["left_out"]:
                    continue
                rng = random.Random(number)
                try:
                    if name == "vllm":
                        vllm = vllm or Vllm(job)
                        results[name] = vllm.turn(rng)
                    else:
                        results[name] = turn(name, job, rng)
                except LeftOut as reason:
                    if name == "isagellm":
                        raise
                    result["left_out"][name] = str(reason)
                    print(f"{key}: {name} is left out: {reason}", flush=True)
                    continue
                numbers = ", ".join(f"{k} {v:.4g}" for k, v in results[name].items())
                print(f"{key} round {number + 1}/{args.rounds} {name}: {numbers}", flush=True)
            result["rounds"].append(results)
            save(result)
    finally:
        if vllm is not None:
            vllm.close()
    return result


def main() -> None:
    """Run the parts, print the table, write JSON, Markdown and plots."""
    args = _arguments()
    began = time.perf_counter()
    for peer in args.peers:
        peers_.install(peer)
    report = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "threads": args.threads, "parts": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for key in args.parts:
        started = time.perf_counter()

        def save(result: dict, key: str = key) -> None:
            report["parts"][key] = result
            (args.out / "cpu.json").write_text(json.dumps(report, indent=1))

        if key == KL:
            save(quality.compare(model_of(PARTS["q4"]), quality.POSITIONS, args.threads))
        else:
            result = run_part(key, args, save)
            write_plot(report, result, args.out / f"cpu-{key}.svg")
        print(f"{key}: {time.perf_counter() - started:.0f} s", flush=True)
    text = table(report)
    (args.out / "cpu.md").write_text(text)
    print(f"\n{text}\n{args.out}/cpu.md, cpu.json, cpu-*.svg; {(time.perf_counter() - began) / 60:.1f} minutes in all")


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    everything = [*PARTS, KL]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=names, default=everything, help=f"of {', '.join(everything)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--peers", type=names, default=list(peers_.DEFAULT), help=f"of {', '.join(peers_.REQUIREMENTS)}"
    )
    parser.add_argument("--rows", type=names, help=f"instead of each part's own; of {', '.join(ROWS)}")
    parser.add_argument("--model", type=Path, help="another GGUF file, for a single part")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    for given, known in ((args.parts, everything), (args.peers, [*peers_.REQUIREMENTS]), (args.rows or [], [*ROWS])):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.model and len(args.parts) != 1:
        parser.error(f"--model is for a single part, {len(args.parts)} are asked for: pass --parts q4")
    return args


def machine() -> str:
    """Processor as it calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
