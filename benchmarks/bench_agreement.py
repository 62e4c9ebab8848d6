"""Whether `sage-llm bench serve` measures what guidellm and aiperf measure: one mock server, the same prompts, interleaved rounds.

    python benchmarks/bench_agreement.py --guidellm BIN --aiperf BIN --tokenizer DIR --out FILE     one round, appended to FILE
    python benchmarks/bench_agreement.py --report FILE                                              medians and ratios over its rounds

`BIN` is the program in an environment of its own (``pip install guidellm``, ``pip install aiperf``); `DIR` holds a ``tokenizer.json`` of the
model, which aiperf and guidellm load and the comparison does not use: all three take the server's own counts. Every round has new prompts and
another order of the tools, and the server forgets KV at once, so that no tool finds the prefix of another in the cache.

Compared are medians over requests of the time to the first token and of the time of each later token ((end - first token) / (tokens - 1),
which the two others call inter token latency), and output tokens a second. The simulated step is long against what a client costs, and each
request has an engine of its own: in one engine requests wait for each other's steps, so that a client which sends the next one a little later
meets another server (with one engine guidellm, whose requests drift apart, sees 6 to 9 % longer tokens than the two which keep in step).
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

from sagellm.bench.workload import Arrival, prompt_of

MODEL = "smollm2:135m"
PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY = 256, 64, 4
METRICS = ("ttft_ms", "tpot_ms", "output_tokens_per_s", "prompt_tokens")
SAGE_LLM = str(Path(sys.executable).with_name("sage-llm"))
Tool = Callable[[str, Path], dict[str, float]]


@contextlib.contextmanager
def mock_server(scale: float) -> Iterator[str]:
    """A server over the simulated device; yields its URL."""
    command = [SAGE_LLM, "serve", "--mock", MODEL, "--port", "0", "--mock-scale", str(scale), "--no-prefix-cache"]
    command += ["--engines", str(CONCURRENCY), "--routing", "least_loaded"]
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
        load = ["--concurrency", str(CONCURRENCY), "--requests", str(self.requests), "--seed", str(self.seed)]
        run([SAGE_LLM, "bench", "serve", MODEL, "--url", url, *sizes, *load, "--output", str(folder)])
        got = json.loads((folder / "run.json").read_text())["summary"]
        return {
            "ttft_ms": got["ttft_ms"]["p50"],
            "tpot_ms": got["tpot_ms"]["p50"],
            "output_tokens_per_s": got["output_tokens_per_s"],
            "prompt_tokens": got["prompt_tokens"] / got["requests"],
        }

    def guidellm(self, url: str, folder: Path) -> dict[str, float]:
        """guidellm: https://pypi.org/project/guidellm/."""
        self._write(folder / "prompts.jsonl", "prompt", "output_tokens_count")
        backend = f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions"
        command = [self.arguments.guidellm, "run", "--backend", backend, "--disable-console"]
        command += ["--profile", f"kind=concurrent,streams={CONCURRENCY}"]
        command += ["--constraint", f"kind=max_requests,count={self.requests}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={self.arguments.tokenizer}"]
        command += ["--data", f"kind=json_file,path={folder / 'prompts.jsonl'}"]
        run([*command, "--output", f"kind=json,path={folder / 'run.json'}"])
        got = json.loads((folder / "run.json").read_text())["benchmarks"][0]["metrics"]
        return {
            "ttft_ms": got["time_to_first_token_ms"]["successful"]["median"],
            "tpot_ms": got["inter_token_latency_ms"]["successful"]["median"],
            "output_tokens_per_s": got["output_tokens_per_second"]["successful"]["mean"],
            "prompt_tokens": got["prompt_token_count"]["successful"]["mean"],
        }

    def aiperf(self, url: str, folder: Path) -> dict[str, float]:
        """aiperf: https://pypi.org/project/aiperf/."""
        self._write(folder / "prompts.jsonl", "text", "output_length")
        command = [self.arguments.aiperf, "profile", "--model", MODEL, "--url", url, "--endpoint-type", "completions"]
        command += ["--streaming", "--tokenizer", self.arguments.tokenizer, "--use-server-token-count", "--ui", "none"]
        command += ["--input-file", str(folder / "prompts.jsonl"), "--custom-dataset-type", "single_turn"]
        command += ["--concurrency", str(CONCURRENCY), "--request-count", str(self.requests)]
        command += ["--warmup-request-count", "4", "--output-artifact-dir", str(folder)]
        for extra in ("ignore_eos:true", f"max_tokens:{OUTPUT_TOKENS}", "temperature:0"):
            command += ["--extra-inputs", extra]
        run(command)
        got = json.loads((folder / "profile_export_aiperf.json").read_text())
        return {
            "ttft_ms": got["time_to_first_token"]["p50"],
            "tpot_ms": got["inter_token_latency"]["p50"],
            "output_tokens_per_s": got["output_token_throughput"]["avg"],
            "prompt_tokens": got["usage_prompt_tokens"]["avg"],
        }

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
    """Run every tool once; a round's seed is its number."""
    done = arguments.out.read_text().count("\n") if arguments.out.exists() else 0
    this = Round(done, arguments.requests, arguments)
    with mock_server(arguments.mock_scale) as url, tempfile.TemporaryDirectory() as root:
        out: dict[str, Any] = {}
        for name, tool in this.tools().items():
            folder = Path(root) / name
            folder.mkdir()
            out[name] = tool(url, folder)
        return out


def report(rounds: list[dict[str, Any]]) -> str:
    """Medians of each tool over the rounds, and the median of the rounds' ratios of ours to each other's."""
    lines = [f"{len(rounds)} rounds, {CONCURRENCY} at a time, {PROMPT_TOKENS} -> {OUTPUT_TOKENS} tokens"]
    for metric in METRICS:
        values = {name: statistics.median(r[name][metric] for r in rounds) for name in rounds[0]}
        ratios = {
            name: statistics.median(r["isagellm"][metric] / r[name][metric] for r in rounds)
            for name in ("guidellm", "aiperf")
        }
        lines.append(
            f"{metric:<20} "
            + "  ".join(f"{name} {values[name]:8.2f}" for name in ("isagellm", "guidellm", "aiperf"))
            + "  ours/theirs "
            + "  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        )
    return "\n".join(lines)


def main() -> None:
    """Run one round or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", default="guidellm")
    parser.add_argument("--aiperf", default="aiperf")
    parser.add_argument("--tokenizer", help="directory with the model's tokenizer.json")
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
