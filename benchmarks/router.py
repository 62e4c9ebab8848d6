"""What a router adds, and what it loses: ours and others over the same mock engines, in interleaved rounds.

    make bench-router                                    installs the peers, each into an environment of its own, and runs this
    python benchmarks/router.py [--peers DIR] [--only NAME,...] [--json FILE]

Measured on loopback, direct and through each router: time to the first token at fixed rates, streamed and whole answers a second
over 32 connections, CPU time of a streamed request, and streams that lack tokens or their ``[DONE]`` while one engine cuts its streams and another
is killed. The row ``floor`` is a proxy that only passes bytes on (`router_floor.py`). Routers run with their own default policy, ours with everything on: journal,
recovery, admission, metrics; in one process, and in two (``--workers 2``), because the others use both cores. For the count of lost
streams the others go round robin: a policy that follows prefixes sends all of these requests to one engine, and which one is luck.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import uvloop

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Connection:
    """A keep-alive HTTP/1.1 connection that only knows how to wait for the first content and the end of a stream."""

    #: Text behind each prompt.
    padding = ""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None

    async def ask(self, tokens: int, serial: int, *, stream: bool = True) -> tuple[float, float, bool]:
        """Return seconds to the first token, seconds to the end, and whether the answer was whole."""
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        message = {"role": "user", "content": f"Request number {serial} of the benchmark, please answer.{self.padding}"}
        body = json.dumps({"model": "mock", "messages": [message], "max_tokens": tokens, "stream": stream}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncontent-type: application/json\r\n"
        )
        began = time.perf_counter()
        self.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        data, first = b"", 0.0
        while True:
            piece = await self.reader.read(65536)
            if not piece:
                self.reader = None
                return first, time.perf_counter() - began, False
            data += piece
            if not first and b'"tok ' in data:
                first = time.perf_counter() - began
            if _is_whole(data):
                # A router may end a stream that broke with an error and a proper end: all tokens must be there.
                whole = data.count(b"tok ") >= tokens and (b"[DONE]" if stream else b'"usage"') in data
                return first, time.perf_counter() - began, whole

    def close(self) -> None:
        if self.reader is not None:
            self.writer.close()


def _is_whole(data: bytes) -> bool:
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return False
    at = (low := head.lower()).find(b"content-length:")
    if at >= 0:
        return len(body) >= int(low[at + 15 :].split(b"\r\n", 1)[0])
    return body.endswith(b"0\r\n\r\n")


async def at_rate(port: int, rate: float, seconds: float, tokens: int) -> list[float]:
    """Open loop: requests at a fixed rate over as many connections as it takes; seconds to the first token."""
    idle: list[Connection] = []
    firsts: list[float] = []

    async def one(serial: int) -> None:
        connection = idle.pop() if idle else Connection(port)
        first, _end, whole = await connection.ask(tokens, serial)
        if whole:
            firsts.append(first)
            idle.append(connection)

    tasks, began = [], time.perf_counter()
    for serial in range(int(rate * seconds)):
        delay = began + serial / rate - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(one(serial)))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return firsts


async def flat_out(port: int, connections: int, seconds: float, tokens: int, *, stream: bool = True) -> float:
    """Closed loop: requests a second."""
    done, until = 0, time.perf_counter() + seconds

    async def worker(number: int) -> None:
        nonlocal done
        connection, serial = Connection(port), number
        while time.perf_counter() < until:
            _first, _end, whole = await connection.ask(tokens, serial, stream=stream)
            serial += connections
            done += whole
        connection.close()

    await asyncio.gather(*(worker(i) for i in range(connections)))
    return done / seconds


async def streams_lost(port: int, count: int, tokens: int, kill: subprocess.Popen) -> int:
    """Streams that were not whole, of `count`, when an engine is killed in the middle."""
    results: list[bool] = []
    queue = list(range(count))

    async def worker() -> None:
        while queue:
            serial = queue.pop()
            connection = Connection(port)
            try:
                results.append((await connection.ask(tokens, serial))[2])
            except OSError:
                results.append(False)
            connection.close()
            if len(results) == count // 3 and kill.poll() is None:
                kill.kill()

    await asyncio.gather(*(worker() for _ in range(20)))
    return results.count(False)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children so far: unlike wall time it does not depend on what else the machine does."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(
            map(cpu_seconds, map(int, children))
        )
    return 0.0


@contextlib.contextmanager
def awake(wanted: bool) -> Iterator[None]:
    """Keep each CPU from halting, by a process that only gets what nobody else wants (SCHED_IDLE).

    In a virtual machine a CPU that has halted takes long to be itself again, and every router pays that several times for each request.
    """
    spinners = []
    for cpu in sorted(os.sched_getaffinity(0)) if wanted else ():
        spinners.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        os.sched_setaffinity(spinners[-1].pid, {cpu})
        os.sched_setscheduler(spinners[-1].pid, os.SCHED_IDLE, os.sched_param(0))
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


class NotServing(Exception):
    """A router did not come up."""


class Cluster:
    """Mock engines and routers as processes."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.scratch = tempfile.TemporaryDirectory()

    def engine(self, *extra: str) -> tuple[int, subprocess.Popen]:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, str(HERE / "router_mock.py"), str(port), *extra], stdout=subprocess.PIPE
        )
        self.processes.append(process)
        process.stdout.readline()
        return port, process

    def router(self, template: str, engines: list[int]) -> tuple[int, subprocess.Popen]:
        port = free_port()
        urls = " ".join(f"http://127.0.0.1:{engine}" for engine in engines)
        command = template.format(
            port=port,
            metrics=free_port(),
            engines=urls,
            ports=" ".join(map(str, engines)),
            python=sys.executable,
            here=HERE,
            scratch=self.scratch.name,
        )
        log = tempfile.TemporaryFile()  # noqa: SIM115 - read when the router does not come up
        process = subprocess.Popen(shlex.split(command), stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        body = json.dumps(
            {"model": "mock", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "stream": True}
        )
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/chat/completions", body.encode(), {"content-type": "application/json"}
                )
                if b"[DONE]" in urllib.request.urlopen(request, timeout=5).read():
                    return port, process
            time.sleep(0.2)
        log.seek(0)
        raise NotServing(f"no answer from: {command}\n{log.read()[-2000:].decode(errors='replace')}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.scratch.cleanup()


OURS = {
    "isagellm": "{python} {here}/router_ours.py {scratch} 1 {port} {ports}",
    "isagellm, 2 workers": "{python} {here}/router_ours.py {scratch} 2 {port} {ports}",
}
FLOOR = "{python} {here}/router_floor.py {port} {ports}"
_COMMON = "--host 127.0.0.1 --port {port} --prometheus-port {metrics} --worker-urls {engines}"
#: Package and version, and how it is started; each gets a port of its own for its metrics, which is the same for all by default.
PEERS = {
    "sglang-router": ("sglang-router==0.3.2", f"sglang-router launch {_COMMON} --log-level error"),
    "vllm-router": ("vllm-router==0.1.17", f"vllm-router {_COMMON} --log-level error"),
    "smg": ("smg==1.13.0", f"smg launch {_COMMON} --log-level error"),
}
RATES = (200, 1000)


def install(root: Path) -> None:
    """Put each peer into an environment of its own."""
    for name, (package, _command) in PEERS.items():
        if not (root / name / "bin" / name).exists():
            subprocess.run([sys.executable, "-m", "venv", str(root / name)], check=True)
            subprocess.run([str(root / name / "bin" / "pip"), "install", "--quiet", package], check=True)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(len(values) * q)] * 1000 if values else float("nan")


async def measure(port: int, router: subprocess.Popen | None, options: argparse.Namespace) -> dict:
    row = {}
    for rate in RATES:
        firsts = await at_rate(port, rate, options.seconds, options.tokens)
        row[f"p50_ms_{rate}"], row[f"p99_ms_{rate}"] = quantile(firsts, 0.5), quantile(firsts, 0.99)
    before = cpu_seconds(router.pid) if router is not None else 0.0
    row["rps"] = await flat_out(port, 32, options.seconds, options.tokens)
    if router is not None:
        row["cpu_us"] = (cpu_seconds(router.pid) - before) / max(row["rps"] * options.seconds, 1) * 1e6
    row["rps_whole"] = await flat_out(port, 32, options.seconds, options.tokens, stream=False)
    return row


async def speed(templates: dict[str, str], options: argparse.Namespace) -> dict[str, list[dict]]:
    """Interleaved rounds over four engines that answer at once."""
    cluster = Cluster()
    report: dict[str, list[dict]] = {}
    try:
        engines = [cluster.engine()[0] for _ in range(4)]
        targets: dict[str, tuple[int, subprocess.Popen | None]] = {"direct": (engines[0], None)}
        for name, template in templates.items():
            try:
                targets[name] = cluster.router(template, engines)
            except NotServing as error:  # noqa: PERF203 - the others are measured all the same
                print(f"{name}: {error}", file=sys.stderr)
        for port, _process in targets.values():
            await flat_out(port, 8, 0.3, options.tokens)
        for _ in range(options.rounds):
            for name, (port, process) in targets.items():
                report.setdefault(name, []).append(await measure(port, process, options))
    finally:
        cluster.close()
    return report


async def lost(template: str) -> int:
    """Streams of 400 that break: one engine cuts each stream after 8 of 30 tokens, one is killed, two are sound."""
    cluster = Cluster()
    try:
        cut = cluster.engine("--token-ms", "5", "--abort-after", "8")[0]
        doomed_port, doomed = cluster.engine("--token-ms", "5")
        sound = [cluster.engine("--token-ms", "5")[0] for _ in range(2)]
        # The router starts over sound engines; its readiness probe must not run into the cut one.
        port, _process = cluster.router(template, [*sound, doomed_port, cut])
        return await streams_lost(port, 400, 30, doomed)
    finally:
        cluster.close()


def table(report: dict[str, dict]) -> str:
    base = report["direct"]
    head = [
        "router",
        *(f"added p50, p99 at {rate}/s [ms]" for rate in RATES),
        "streams/s",
        "whole/s",
        "CPU [us]",
        "lost of 400",
    ]
    lines = [head, ["---"] * len(head)]
    for name, row in report.items():
        if name == "direct":
            added = [f"({row[f'p50_ms_{r}']:.2f}, {row[f'p99_ms_{r}']:.2f})" for r in RATES]
        else:
            added = [
                ", ".join(f"{row[f'{q}_ms_{r}'] - base[f'{q}_ms_{r}']:+.2f}" for q in ("p50", "p99")) for r in RATES
            ]
        rest = [
            f"{row['rps']:,.0f}",
            f"{row['rps_whole']:,.0f}",
            f"{row.get('cpu_us', 0):.0f}",
            str(row.get("lost", "-")),
        ]
        lines.append([name, *added, *rest])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with an environment for each peer; made by --install")
    parser.add_argument("--install", action="store_true", help="make those environments, and end")
    parser.add_argument("--only", help="beginnings of names, with commas; ours is isagellm, floor the least proxy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=0, metavar="BYTES", help="of text that follows each prompt")
    parser.add_argument("--lost", action=argparse.BooleanOptionalAction, default=True, help="count lost streams too")
    parser.add_argument("--awake", action="store_true", help="keep the CPUs from halting, by idle-priority processes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.install:
        install(options.peers)
        return
    Connection.padding = (" the quick brown fox jumps over the lazy dog." * (options.prompt // 45 + 1))[
        : options.prompt
    ]
    templates = {"floor": FLOOR, **OURS}
    if options.peers is not None:
        templates |= {
            name: f"{(options.peers / name / 'bin').absolute()}/{command}" for name, (_p, command) in PEERS.items()
        }
    if options.only:
        templates = {name: t for name, t in templates.items() if name.startswith(tuple(options.only.split(",")))}
    with awake(options.awake):
        rounds = await speed(templates, options)
    report = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in rounds.items()
    }
    for name, row in report.items():
        if options.lost and name in templates and name != "floor":
            row["lost"] = await lost(templates[name] + (" --policy round_robin" if name in PEERS else ""))
    print(table(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"median": report, "rounds": rounds}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    uvloop.run(main())
