"""Whether `sage-llm bench serve` measures what guidellm and aiperf measure: one mock engine that all requests share, interleaved rounds.

    python benchmarks/bench_agreement.py --guidellm BIN --aiperf BIN --tokenizer DIR --out FILE     one round, appended to FILE
    python benchmarks/bench_agreement.py --report FILE                                              medians and ratios over its rounds

`BIN` is the program in an environment of its own (``pip install guidellm``, ``pip install aiperf``); `DIR` holds a ``tokenizer.json`` of the
model, which aiperf and guidellm load and the comparison does not use: all three take the server's own counts. Every round has new prompts and
another order of the tools, and the server forgets KV at once, so that no tool finds the prefix of another in the cache.

Compared are means over requests (in a closed loop on one engine the times to the first token fall into groups, and a median into one or the
other) of the time to the first token and of the time of each later token ((last - first) / (tokens - 1), which the two others call inter
token latency), and output tokens a second. Two questions are kept apart:

* *Does a tool report what happened?* Between it and the server stands a relay that notes what crosses the wire (`wire_tap`), and each of its
  numbers is set beside the same number from the wire.
* *Do two tools make the same load?* With ``--load rate`` (requests evenly, whatever the server does) they do. With ``--load closed`` (4 at a
  time) the server meets whatever the tool makes of that: the wire also tells how many were in flight, and how many prefills of others a
  request met while it decoded, which is what makes its tokens longer on one engine.

One definition differs: aiperf counts its seconds from the start of its schedule, one gap before the first request, so that with ``--load rate``
its output tokens a second are low by that gap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wire_tap import numbers, tap

from sagellm.bench.workload import Arrival, prompt_of

MODEL = "smollm2:135m"
PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 256, 64, 4
METRICS = ("ttft_ms", "tpot_ms", "output_tokens_per_s", "prompt_tokens")
LOAD = {"closed": ("in_flight", "prefills_met", "think_ms"), "rate": ("in_flight", "prefills_met")}
PEERS = ("guidellm", "aiperf")
SAGE_LLM = str(Path(sys.executable).with_name("sage-llm"))
Tool = Callable[[str, Path], dict[str, float]]


@contextlib.contextmanager
def mock_server(scale: float) -> Iterator[str]:
    """A server over the simulated device; yields its URL."""
    command = [SAGE_LLM, "serve", "--mock", MODEL, "--port", "0", "--mock-scale", str(scale), "--no-prefix-cache"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            for line in server.stdout or ():
                if found := re.search(r"ready\s+(http://\S+?)/v1", line):
                    yield found[1]
                    return
            raise SystemExit("the server did not start")
        finally:
            server.terminate()


class Round:
    """One workload for all tools."""

    def __init__(self, seed: int, requests: int, arguments: argparse.Namespace) -> None:
        self.seed, self.requests, self.arguments = seed, requests, arguments
        self.rate = str(arguments.rate)
        arrival = Arrival(None, PROMPT_TOKENS, OUTPUT_TOKENS)
        self.prompts = [prompt_of(arrival, i, seed) for i in range(requests)]

    def tools(self) -> dict[str, Tool]:
        """The tools in this round's order."""
        tools: list[tuple[str, Tool]] = [
            ("isagellm", self.isagellm),
            ("guidellm", self.guidellm),
            ("aiperf", self.aiperf),
        ]
        first = self.seed % len(tools)
        return dict(tools[first:] + tools[:first])

    def isagellm(self, url: str, folder: Path) -> dict[str, float]:
        """Our own; its prompts follow from the seed."""
        sizes = ["--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)]
        load = ["--requests", str(self.requests), "--seed", str(self.seed)]
        load += self._load(["--concurrency", str(CONCURRENCY)], ["--pattern", "constant", "--rate", self.rate])
        run([SAGE_LLM, "bench", "serve", MODEL, "--url", url, *sizes, *load, "--output", str(folder)])
        got = json.loads((folder / "run.json").read_text())["summary"]
        return {
            "ttft_ms": got["ttft_ms"]["mean"],
            "tpot_ms": got["tpot_ms"]["mean"],
            "output_tokens_per_s": got["output_tokens_per_s"],
            "prompt_tokens": got["prompt_tokens"] / got["requests"],
        }

    def guidellm(self, url: str, folder: Path) -> dict[str, float]:
        """guidellm: https://pypi.org/project/guidellm/."""
        self._write(folder / "prompts.jsonl", "prompt", "output_tokens_count")
        backend = f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions"
        command = [self.arguments.guidellm, "run", "--backend", backend, "--disable-console"]
        profile = self._load([f"kind=concurrent,streams={CONCURRENCY}"], [f"kind=constant,rate={self.rate}"])
        command += ["--profile", *profile]
        command += ["--constraint", f"kind=max_requests,count={self.requests}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={self.arguments.tokenizer}"]
        command += ["--data", f"kind=json_file,path={folder / 'prompts.jsonl'}"]
        run([*command, "--output", f"kind=json,path={folder / 'run.json'}"])
        got = json.loads((folder / "run.json").read_text())["benchmarks"][0]["metrics"]
        return {
            "ttft_ms": got["time_to_first_token_ms"]["successful"]["mean"],
            "tpot_ms": got["inter_token_latency_ms"]["successful"]["mean"],
            "output_tokens_per_s": got["output_tokens_per_second"]["successful"]["mean"],
            "prompt_tokens": got["prompt_token_count"]["successful"]["mean"],
        }

    def aiperf(self, url: str, folder: Path) -> dict[str, float]:
        """aiperf: https://pypi.org/project/aiperf/."""
        self._write(folder / "prompts.jsonl", "text", "output_length")
        command = [self.arguments.aiperf, "profile", "--model", MODEL, "--url", url, "--endpoint-type", "completions"]
        command += ["--streaming", "--tokenizer", self.arguments.tokenizer, "--use-server-token-count", "--ui", "none"]
        command += ["--input-file", str(folder / "prompts.jsonl"), "--custom-dataset-type", "single_turn"]
        command += ["--request-count", str(self.requests)]
        rate = ["--request-rate", self.rate, "--arrival-pattern", "constant"]
        command += self._load(["--concurrency", str(CONCURRENCY)], rate)
        command += ["--warmup-request-count", "4", "--output-artifact-dir", str(folder)]
        for extra in ("ignore_eos:true", f"max_tokens:{OUTPUT_TOKENS}", "temperature:0"):
            command += ["--extra-inputs", extra]
        run(command)
        got = json.loads((folder / "profile_export_aiperf.json").read_text())
        return {
            "ttft_ms": got["time_to_first_token"]["avg"],
            "tpot_ms": got["inter_token_latency"]["avg"],
            "output_tokens_per_s": got["output_token_throughput"]["avg"],
            "prompt_tokens": got["usage_prompt_tokens"]["avg"],
        }

    def _load(self, closed: list[str], rate: list[str]) -> list[str]:
        return closed if self.arguments.load == "closed" else rate

    def _write(self, path: Path, prompt: str, length: str) -> None:
        rows = (json.dumps({prompt: text, length: OUTPUT_TOKENS}) for text in self.prompts)
        path.write_text("\n".join(rows) + "\n")


def run(command: list[str]) -> None:
    """Run a tool; what it prints is shown only if it fails. HF_HUB_OFFLINE would make aiperf refuse a local directory."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}")


def one_round(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every tool once; a round's seed is its number. The relay also sees warm-up requests, which come first."""
    done = arguments.out.read_text().count("\n") if arguments.out.exists() else 0
    this = Round(done, arguments.requests, arguments)
    with mock_server(arguments.mock_scale) as server, tempfile.TemporaryDirectory() as root:
        out: dict[str, Any] = {"load": arguments.load}
        for name, tool in this.tools().items():
            folder = Path(root) / name
            folder.mkdir()
            with tap(server) as (url, seen):
                said = tool(url, folder)
            measured = sorted(seen, key=lambda exchange: exchange.arrived)[-this.requests :]
            out[name] = {"said": said, "wire": numbers(measured, CONCURRENCY)}
        return out


def report(rounds: list[dict[str, Any]]) -> str:
    """For each load: what each tool said beside what crossed the wire, and the same of two tools beside each other; medians over rounds."""
    return "\n".join(
        line for load in ("rate", "closed") for line in _of_load(load, [r for r in rounds if r["load"] == load])
    )


def _of_load(load: str, rounds: list[dict[str, Any]]) -> Iterator[str]:
    if not rounds:
        return
    yield f"{load}: {len(rounds)} rounds, {PROMPT_TOKENS} -> {OUTPUT_TOKENS} tokens, one engine"
    tools = ("isagellm", *PEERS)
    for metric in METRICS:
        said = {t: statistics.median(r[t]["said"][metric] for r in rounds) for t in tools}
        wire = {t: statistics.median(r[t]["said"][metric] / r[t]["wire"][metric] for r in rounds) for t in tools}
        ours = {
            t: statistics.median(r["isagellm"]["said"][metric] / r[t]["said"][metric] for r in rounds) for t in PEERS
        }
        yield (
            f"  {metric:<20} "
            + "  ".join(f"{t} {said[t]:8.2f} ({wire[t]:.3f} of the wire)" for t in tools)
            + "  ours/theirs "
            + "  ".join(f"{t} {ours[t]:.3f}" for t in PEERS)
        )
    for number in LOAD[load]:
        values = {t: statistics.median(r[t]["wire"][number] for r in rounds) for t in tools}
        yield f"  {number:<20} " + "  ".join(f"{t} {values[t]:8.2f}" for t in tools)


def main() -> None:
    """Run one round or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", default="guidellm")
    parser.add_argument("--aiperf", default="aiperf")
    parser.add_argument("--tokenizer", help="directory with the model's tokenizer.json")
    parser.add_argument("--load", choices=("closed", "rate"), default="closed")
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second, for --load rate")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--mock-scale", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=Path("bench_agreement.jsonl"))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report is None:
        if not arguments.tokenizer:
            parser.error("--tokenizer is missing: a directory with the model's tokenizer.json")
        line = json.dumps(one_round(arguments))
        with arguments.out.open("a") as file:
            file.write(line + "\n")
    print(report([json.loads(line) for line in (arguments.report or arguments.out).read_text().splitlines()]))


if __name__ == "__main__":
    main()
