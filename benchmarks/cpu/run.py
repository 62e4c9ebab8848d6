"""`make bench`: isagellm and its peers on the same weights, interleaved in one run on this machine.

Each round runs every contender once, one at a time, in fresh processes: A B C, A B C, ... A row's number is the median over the
rounds; the ratio is taken round by round against the best peer of that row, so that a noisy neighbour hits both sides.

    python benchmarks/cpu/run.py [--format q4|q8|bf16] [--rounds 5] [--peers llama.cpp,openvino] [--rows decode,http1,...]

The file of a format is a requantised copy of the default model, the same for everybody (``--model`` takes another).

A contender is a process that speaks one JSON object a line: ``{"ready": true, ...}`` when loaded, then for each command
(``{"op": "one", "prompt": ids, "n": tokens}``, ``{"op": "many", "prompts": ...}``, ``{"op": "rss"}``) one answer with
``prefill_s``, ``decode_s``, ``tokens`` (and ``ttft_s``). Servers are measured over HTTP by load.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import peers as peers_
from load import run_streams
from report import print_table, write_plot

HERE = Path(__file__).parent
VOCABULARY = range(1000, 40_000)
FORMATS = {"q4": "Q4_0", "q8": "Q8_0", "bf16": "BF16"}
PARAMETERS = 106_200_000  # of SmolLM2-135M that a prompt token meets: without the tied embedding


def model_of(kind: str) -> Path:
    """The default model in that precision, made on first use."""
    target = peers_.home().parent / "bench-models" / f"smollm2.{FORMATS[kind]}.gguf"
    if not target.exists():
        from requantise import requantise

        from sagellm import store

        target.parent.mkdir(parents=True, exist_ok=True)
        requantise(store.resolve("smollm2:135m").path, FORMATS[kind], target)
    return target


class LineProcess:
    """A contender in its own process."""

    def __init__(self, argv: list[str], options: dict) -> None:
        self.process = subprocess.Popen(
            [*argv, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ready = self._read()

    def ask(self, **command: object) -> dict:
        """Send one command, return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args[1]} ended with {self.process.wait()}")


class OurServer:
    """`sage-llm serve` as a user starts it."""

    def __init__(self, model: str, streams: int, threads: int, ctx: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        argv = [
            "serve",
            f"bench={model}",
            "--port",
            port,
            "--parallel",
            max(2, streams),
            "--ctx",
            ctx,
            "--threads",
            threads,
        ]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("sage-llm")), *map(str, argv)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.ready_s = self._wait()

    def _wait(self) -> float:
        while time.perf_counter() - self.started < 120:
            try:
                with urllib.request.urlopen(self.url + "/ready", timeout=5) as answer:
                    if answer.status == 200:
                        return time.perf_counter() - self.started
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    raise RuntimeError(f"sage-llm serve ended with {self.process.returncode}") from None
            time.sleep(0.005)
        raise RuntimeError("sage-llm serve was not ready within 120 s")

    def rss(self) -> int:
        """Peak resident bytes of the gateway and its engines (`ps` shows both)."""
        pids = [
            self.process.pid,
            *map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()),
        ]
        return sum(_peak_rss(pid) for pid in pids)

    def close(self) -> None:
        """Stop it as a user does."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _peak_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def prompts(rng: random.Random, count: int, length: int) -> list[list[int]]:
    """Random prompts: no two share a prefix."""
    return [[rng.choice(VOCABULARY) for _ in range(length)] for _ in range(count)]


# Row -> (streams of the server, unit, whether more is better).
ROWS = {
    "decode": (1, "tok/s", True),
    "prefill512": (1, "tok/s", True),
    "prefill2048": (1, "tok/s", True),
    "http1": (1, "tok/s", True),
    "ready": (1, "s", False),
    "first_token": (1, "s", False),
    "streams16": (16, "tok/s", True),
    "ttft16": (16, "s", False),
    "streams16_p256": (16, "tok/s", True),
    "rss16": (16, "MB", False),
    "streams32": (32, "tok/s", True),
}
ROW_TITLES = {
    "decode": "decode, one stream, 128 tokens",
    "prefill512": "prefill 512",
    "prefill2048": "prefill 2,048",
    "http1": "one stream over HTTP",
    "ready": "command to ready",
    "first_token": "command to first token",
    "streams16": "16 streams, prompt 32",
    "ttft16": "mean TTFT at 16 streams",
    "streams16_p256": "16 streams, prompt 256",
    "rss16": "peak resident memory, 16 streams",
    "streams32": "32 streams, prompt 32",
}


def single_rows(session: LineProcess, rng: random.Random, rows: set[str]) -> dict[str, float]:
    """Rows of one request at a time, in process; a first request warms up."""
    session.ask(op="one", prompt=prompts(rng, 1, 32)[0], n=8)
    out: dict[str, float] = {}
    if "decode" in rows:
        answer = session.ask(op="one", prompt=prompts(rng, 1, 32)[0], n=129)
        out["decode"] = (answer["tokens"] - 1) / answer["decode_s"]
    for n in (512, 2048):
        if f"prefill{n}" in rows:
            answer = session.ask(op="one", prompt=prompts(rng, 1, n)[0], n=2)
            out[f"prefill{n}"] = n / answer["prefill_s"]
    return out


def stream_rows(run, rng: random.Random, streams: int, rows: set[str]) -> dict[str, float]:
    """Rows of many requests at once; `run(prompts, n)` is one burst."""
    run(prompts(rng, streams, 32), 8)
    out: dict[str, float] = {}
    if f"streams{streams}" in rows:
        answer = run(prompts(rng, streams, 32), 128)
        out[f"streams{streams}"] = answer["tokens"] / answer["total_s"]
        if streams == 16:
            out["ttft16"] = statistics.mean(answer["ttft_s"])
    if streams == 16 and "streams16_p256" in rows:
        answer = run(prompts(rng, streams, 256), 128)
        out["streams16_p256"] = answer["tokens"] / answer["total_s"]
    return out


def run_contender(name: str, args: argparse.Namespace, rng: random.Random) -> dict[str, float]:
    """One contender's turn in a round."""
    rows = set(args.rows)
    out: dict[str, float] = {}
    for streams in (1, 16, 32):
        if not any(ROWS[row][0] == streams for row in rows):
            continue
        ctx = 2304 if streams == 1 else 512
        options = {"model": args.model, "streams": streams, "threads": args.threads, "ctx": ctx}
        if name == "isagellm":
            out |= _our_turn(options, rng, rows, streams)
            continue
        session = LineProcess([str(peers_.python_of(name)), str(HERE / peers_.SCRIPTS[name])], options)
        try:
            url = session.ready.get("url")
            if streams == 1:
                out |= single_rows(session, rng, rows)
                out["ready"] = session.ready["load_s"]
                if url and "http1" in rows:
                    out["http1"] = _http1(url, rng)
            else:
                burst = (
                    (lambda p, n, u=url: run_streams(u, "any", p, n))
                    if url
                    else (lambda p, n, s=session: s.ask(op="many", prompts=p, n=n))
                )
                out |= stream_rows(burst, rng, streams, rows)
                if streams == 16:
                    out["rss16"] = session.ask(op="rss")["rss"] / 1e6
        finally:
            session.close()
    return {row: value for row, value in out.items() if row in rows or row.endswith("_limit")}


def _our_turn(options: dict, rng: random.Random, rows: set[str], streams: int) -> dict[str, float]:
    out: dict[str, float] = {}
    if streams == 1:
        session = LineProcess([sys.executable, str(HERE / "with_isagellm.py")], options)
        try:
            out |= single_rows(session, rng, rows)
            limits = session.ask(op="limits")
            out["decode_limit"] = limits["read_bytes_per_s"] / session.ready["weight_bytes"]
            out["prefill_limit"] = limits["int8_ops_per_s"] / (2 * PARAMETERS)
        finally:
            session.close()
    server = OurServer(options["model"], streams, options["threads"], options["ctx"])
    try:
        if streams == 1:
            out["ready"] = server.ready_s
            answer = run_streams(server.url, "bench", prompts(rng, 1, 32), 2)
            out["first_token"] = server.ready_s + answer["ttft_s"][0]
            out["http1"] = _http1(server.url, rng, "bench")
        else:
            out |= stream_rows(lambda p, n: run_streams(server.url, "bench", p, n), rng, streams, rows)
            if streams == 16:
                out["rss16"] = server.rss() / 1e6
    finally:
        server.close()
    return out


def _http1(url: str, rng: random.Random, model: str = "any") -> float:
    run_streams(url, model, prompts(rng, 1, 32), 8)
    answer = run_streams(url, model, prompts(rng, 1, 32), 128)
    return answer["tokens"] / answer["total_s"]


def main() -> None:
    """Run the rounds, print the table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=sorted(FORMATS), default="q4", help="precision of everybody's weights")
    parser.add_argument("--model", type=Path, help="another GGUF file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", type=lambda s: [p for p in s.split(",") if p], default=None)
    parser.add_argument("--rows", type=lambda s: s.split(","), default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    args.peers = (
        args.peers if args.peers is not None else [p for p in peers_.SCRIPTS if args.format in peers_.FORMATS[p]]
    )
    unknown = [r for r in args.rows if r not in ROWS] + [p for p in args.peers if p not in peers_.SCRIPTS]
    if unknown:
        parser.error(
            f"unknown: {', '.join(unknown)}; rows are {', '.join(ROWS)}; peers are {', '.join(peers_.SCRIPTS)}"
        )
    contenders = ["isagellm", *args.peers]
    args.model = str(args.model or model_of(args.format))
    for peer in args.peers:
        peers_.install(peer)
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        order = contenders if number % 2 == 0 else contenders[::-1]
        results = {}
        for name in order:
            results[name] = run_contender(name, args, random.Random(number))
            print(
                f"round {number + 1}/{args.rounds} {name}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in results[name].items()),
                flush=True,
            )
        rounds.append(results)
    args.out.mkdir(exist_ok=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "threads": args.threads,
        "model": Path(args.model).name,
        "format": args.format,
        "rounds": rounds,
        "machine": machine(),
    }
    (args.out / f"cpu-{args.format}.json").write_text(json.dumps(result, indent=1))
    print_table(result, ROWS, ROW_TITLES)
    write_plot(result, ROWS, ROW_TITLES, args.out / f"cpu-{args.format}.svg")


def machine() -> str:
    """Processor as it calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


if __name__ == "__main__":
    main()
