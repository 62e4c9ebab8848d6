"""What a router adds, and what it loses: ours and others over the same mock engines, in interleaved rounds.

    python benchmarks/router.py --peer smg=/venv/bin/smg ...

Each peer is a command line that gets ``{port}`` and ``{engines}`` (URLs with spaces) filled in. Measured on loopback: time to the first
token and to the end at a fixed rate (direct and through each router), requests a second over a number of connections, and streams
that end without ``[DONE]`` while one engine cuts its streams and another is killed.
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
import time
import urllib.request
from pathlib import Path

import uvloop

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Connection:
    """A keep-alive HTTP/1.1 connection that only knows how to wait for the first content and the end of a stream."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None

    async def ask(self, tokens: int, serial: int) -> tuple[float, float, bool]:
        """Return seconds to the first token, seconds to the end, and whether the stream was whole."""
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        message = {"role": "user", "content": f"Request number {serial} of the benchmark, please answer."}
        body = json.dumps({"model": "mock", "messages": [message], "max_tokens": tokens, "stream": True}).encode()
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
            if data.endswith(b"0\r\n\r\n") or (b"[DONE]" in data and data.endswith(b"\r\n\r\n")):
                if b"transfer-encoding" not in data.lower().split(b"\r\n\r\n")[0]:
                    self.reader = None
                return first, time.perf_counter() - began, b"[DONE]" in data

    def close(self) -> None:
        if self.reader is not None:
            self.writer.close()


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


async def flat_out(port: int, connections: int, seconds: float, tokens: int) -> float:
    """Closed loop: requests a second."""
    done, until = 0, time.perf_counter() + seconds

    async def worker(number: int) -> None:
        nonlocal done
        connection, serial = Connection(port), number
        while time.perf_counter() < until:
            _first, _end, whole = await connection.ask(tokens, serial)
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


def cpu_seconds(process: subprocess.Popen) -> float:
    """CPU time of a process so far: unlike wall time it does not depend on what else the machine does."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Cluster:
    """Mock engines and routers as processes."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []

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
            port=port, engines=urls, ports=" ".join(map(str, engines)), python=sys.executable, here=HERE
        )
        self.processes.append(
            subprocess.Popen(shlex.split(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        body = json.dumps(
            {"model": "mock", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "stream": True}
        )
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/chat/completions", body.encode(), {"content-type": "application/json"}
                )
                if b"[DONE]" in urllib.request.urlopen(request, timeout=5).read():
                    return port, self.processes[-1]
            time.sleep(0.2)
        raise SystemExit(f"no answer from: {command}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


OURS = "{python} {here}/router_ours.py {port} {ports}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="name=command line with {port} and {engines}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    templates = {"isagellm": OURS} | dict(peer.split("=", 1) for peer in options.peer)
    report = {name: {"p50_ms": [], "p99_ms": [], "rps": [], "cpu_us": []} for name in ["direct", *templates]}
    cluster = Cluster()
    try:
        engines = [cluster.engine()[0] for _ in range(4)]
        routers = {name: cluster.router(text, engines) for name, text in templates.items()}
        ports = {"direct": engines[0]} | {name: port for name, (port, _process) in routers.items()}
        for _ in range(options.rounds):
            for name, port in ports.items():
                firsts = sorted(await at_rate(port, 200, options.seconds, options.tokens))
                report[name]["p50_ms"].append(firsts[len(firsts) // 2] * 1000)
                report[name]["p99_ms"].append(firsts[int(len(firsts) * 0.99)] * 1000)
                before = cpu_seconds(routers[name][1]) if name in routers else 0.0
                rps = await flat_out(port, 32, options.seconds, options.tokens)
                report[name]["rps"].append(rps)
                spent = cpu_seconds(routers[name][1]) - before if name in routers else 0.0
                report[name]["cpu_us"].append(spent / max(rps * options.seconds, 1) * 1e6)
    finally:
        cluster.close()
    for name, template in templates.items():
        cluster = Cluster()
        try:
            cut = cluster.engine("--token-ms", "5", "--abort-after", "8")[0]
            doomed_port, doomed = cluster.engine("--token-ms", "5")
            sound = [cluster.engine("--token-ms", "5")[0] for _ in range(2)]
            # The router starts over sound engines; its readiness probe must not run into the cut one.
            port, _process = cluster.router(template, [*sound, doomed_port, cut])
            report[name]["lost_of_400"] = await streams_lost(port, 400, 30, doomed)
        finally:
            cluster.close()
    base = statistics.median(report["direct"]["p50_ms"])
    for name, row in report.items():
        p50, p99, rps, cpu = (statistics.median(row[key]) for key in ("p50_ms", "p99_ms", "rps", "cpu_us"))
        lost = row.get("lost_of_400", "-")
        print(
            f"{name:<16} p50 {p50:6.2f} ms (added {p50 - base:+.2f})  p99 {p99:7.2f} ms  {rps:8.0f} req/s  {cpu:6.0f} us CPU a request  lost of 400: {lost}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    uvloop.run(main())
