"""Speed of the gateway alone: tokens/s over 64 streams, requests/s, added time to first token, memory of idle streams.

The server runs in a process of its own, over an engine that is a clock: it has emitted ``rate * seconds`` tokens by any moment,
whether or not the gateway keeps up, as an engine in another process does. Run: ``python benchmarks/gateway.py [--server granian]``.

The time to the first token is measured in turns with that of a floor: a server on the same core that answers every request with the
same bytes and does nothing else. What the floor has, the machine and the load generator have; the rest the gateway adds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

from sagellm_protocol.generation import ChoiceDelta, GenerationEnd, GenerationRequest, GenerationStart, Usage

MODEL = "bench"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Say something."}], "temperature": 0.5}


class ClockManager:
    """A control plane's data path whose engine is a clock; the prompt says how fast and how long."""

    sampling_defaults: ClassVar[dict[str, float]] = {}
    context_length = 1 << 20

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def list_models(self) -> list[str]:
        return [MODEL]

    def chat_model(self, model_id: str) -> ClockManager:
        del model_id
        return self

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Any, None]:
        yield GenerationStart(request_id=request.request_id, model=MODEL, prompt_tokens=4)
        seconds = float(request.metadata.get("seconds", 0))
        rate = float(request.metadata.get("rate", 0))
        count = request.sampling.max_tokens or 1
        began, sent = time.monotonic(), 0
        delta = ChoiceDelta(text=" word", token_ids=(7,))
        if rate == 0 and seconds:
            await asyncio.sleep(seconds)
        while sent < count:
            due = count if rate == 0 else min(count, int((time.monotonic() - began) * rate))
            while sent < due:
                sent += 1
                yield delta
            if sent < count:
                await asyncio.sleep(1 / rate)
        yield ChoiceDelta(finish_reason="length")
        yield GenerationEnd(usage=Usage(prompt_tokens=4, completion_tokens=count), ttft_s=0.0, duration_s=0.0)


def make_app() -> Any:
    from sagellm_gateway.config import GatewayConfig, Limits
    from sagellm_gateway.server import create_app

    config = GatewayConfig(
        state_path=os.environ["BENCH_STATE"], require_key=True, access_log=False, limits=Limits(in_flight=10_000)
    )
    return create_app(ClockManager(), config)  # type: ignore[arg-type]


def serve(kind: str, port: int) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    if kind == "granian":
        from granian import Granian

        Granian(
            "gateway:make_app", factory=True, address="127.0.0.1", port=port, interface="asgi", log_enabled=False
        ).serve()
        return
    from sagellm_gateway.server import serve as serve_app

    app = make_app()
    config = app.state.gateway.config
    import msgspec

    serve_app(app, msgspec.structs.replace(config, port=port))


class Floor(asyncio.Protocol):
    """Answers any request with a stream that is ready made."""

    chunk = (
        b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"bench","choices":[{"index":0,'
        b'"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    answer = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunk), chunk)
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        del data  # a request comes in one piece, and nothing of it matters
        self.transport.write(self.answer)  # type: ignore[attr-defined]


def serve_floor(port: int) -> None:
    import uvloop

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(forever())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Client:
    """Raw keep-alive HTTP/1.1: the load generator must not be what is measured."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key

    def request(self, body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)


async def whole(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode())
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    await reader.readexactly(length)


async def streams(client: Client, n: int, tokens: int, rate: float) -> float:
    """Return tokens/s over `n` streams at an offered `rate` of tokens a second for each."""
    body = {**BODY, "stream": True, "max_tokens": tokens, "metadata": {"rate": str(rate)}}
    data = client.request(body)

    async def one() -> int:
        reader, writer = await client.open()
        writer.write(data)
        seen = 0
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            part = await reader.read(1 << 18)
            if not part:
                raise RuntimeError("the stream broke off")
            seen += part.count(b'"content":" word"')
            tail = (tail + part)[-8:]
        writer.close()
        return seen

    began = time.perf_counter()
    counts = await asyncio.gather(*(one() for _ in range(n)))
    if set(counts) != {tokens}:
        raise RuntimeError(f"tokens were lost: {sorted(set(counts))}")
    return sum(counts) / (time.perf_counter() - began)


async def plain(client: Client, connections: int, seconds: float) -> float:
    """Return non-stream requests/s."""
    data = client.request({**BODY, "max_tokens": 1})
    end = time.perf_counter() + seconds
    done = 0

    async def one() -> None:
        nonlocal done
        reader, writer = await client.open()
        while time.perf_counter() < end:
            writer.write(data)
            await whole(reader)
            done += 1
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(connections)))
    return done / (time.perf_counter() - began)


async def first_token(client: Client, rps: float, seconds: float) -> list[float]:
    """Return the times to the first content chunk in ms, at `rps` streams a second (the engine takes none)."""
    data = client.request({**BODY, "stream": True, "max_tokens": 4})
    times: list[float] = []
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def one() -> None:
        reader, writer = idle.pop() if idle else await client.open()
        began = time.perf_counter()
        writer.write(data)
        seen = b""
        while b'"content":" word"' not in seen:
            seen += await reader.read(1 << 16)
        times.append(time.perf_counter() - began)
        while not seen.endswith(b"0\r\n\r\n"):
            seen += await reader.read(1 << 16)
        idle.append((reader, writer))

    tasks = []
    began = time.perf_counter()
    for i in range(int(rps * seconds)):
        wait = began + i / rps - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one()))
    await asyncio.gather(*tasks)
    return [t * 1e3 for t in times]


async def added(client: Client, floor: Client, rps: float, rounds: int, seconds: float) -> dict[str, float]:
    """Return p50 and p99 of the time to the first token through the gateway and of the floor, taken in turns."""
    times: dict[str, list[float]] = {"ttft": [], "floor": []}
    gc.collect()
    gc.disable()  # pauses of the load generator are not the server's
    for _ in range(rounds):
        times["floor"] += await first_token(floor, rps, seconds)
        times["ttft"] += await first_token(client, rps, seconds)
    gc.enable()
    cuts = {name: statistics.quantiles(found, n=100) for name, found in times.items()}
    return {f"{name}_{label}_ms": cuts[name][at] for name in cuts for label, at in (("p50", 49), ("p99", 98))}


async def idle_memory(client: Client, pid: int, n: int) -> tuple[float, float]:
    """Return RSS in MB before and with `n` streams that wait."""
    import psutil

    def rss() -> float:
        process = psutil.Process(pid)
        return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) / 1e6

    before = rss()
    data = client.request({**BODY, "stream": True, "max_tokens": 1, "metadata": {"seconds": "60"}})
    connections = []
    for _ in range(n):
        reader, writer = await client.open()
        writer.write(data)
        connections.append((reader, writer))
    await asyncio.gather(*(reader.readuntil(b"\r\n\r\n") for reader, _ in connections))
    await asyncio.sleep(1)
    during = rss()
    for _, writer in connections:
        writer.close()
    return before, during


def cpu_seconds(pid: int) -> float:
    """Return the processor time of the server, which a busy machine does not change."""
    import psutil

    process = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


async def measure(port: int, floor_port: int, key: str, pid: int) -> dict[str, float]:
    client = Client(port, key)
    await plain(client, 8, 1)
    found: dict[str, float] = {}
    used, began = cpu_seconds(pid), time.perf_counter()
    found["requests_per_s"] = await plain(client, 32, 5)
    count = found["requests_per_s"] * (time.perf_counter() - began)
    found["us_per_request"] = (cpu_seconds(pid) - used) / count * 1e6
    found["tokens_per_s"] = 0.0
    for rate in (1000, 2000):
        used = cpu_seconds(pid)
        speed = await streams(client, 64, 3000, rate)
        if speed > found["tokens_per_s"]:
            found["tokens_per_s"] = speed
            found["us_per_token"] = (cpu_seconds(pid) - used) / (64 * 3000) * 1e6
    found |= await added(client, Client(floor_port, key), 500, rounds=3, seconds=3)
    found["rss_mb"], found["rss_2000_idle_mb"] = await idle_memory(client, pid, 2000)
    return found


def wait_for(port: int) -> None:
    for _ in range(400):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError("the server did not start within 20 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", choices=("uvicorn", "granian"), default="uvicorn")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    # granian imports the app by name, in a process of its own.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        state = os.environ["BENCH_STATE"] = str(Path(folder) / "state.db")
        from sagellm_gateway.store.database import Database
        from sagellm_gateway.store.keys import KeyStore

        database = Database(state)
        _, key = KeyStore(database).add("bench")
        database.close()
        port, floor_port = free_port(), free_port()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=serve, args=(options.server, port))
        floor = context.Process(target=serve_floor, args=(floor_port,))
        process.start()
        floor.start()
        try:
            wait_for(port)
            wait_for(floor_port)
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) > 1:
                os.sched_setaffinity(0, set(cores[1:]))
            import uvloop

            found = uvloop.run(measure(port, floor_port, key, process.pid or 0))
        finally:
            for child in (process, floor):
                child.terminate()
                child.join(20)
    if options.json:
        print(json.dumps(found))
        return
    print(f"gateway on {options.server}, one core, keys, validation and metrics on")
    print(f"  tokens/s over 64 streams    {found['tokens_per_s']:10,.0f}   goal 60,000")
    print(f"  non-stream requests/s       {found['requests_per_s']:10,.0f}   goal  4,000")
    print(
        f"  processor time              {found['us_per_request']:8.0f} us a request, {found['us_per_token']:.1f} us a token"
    )
    for name, goal in (("p50", 1), ("p99", 5)):
        ttft, floor_ms = found[f"ttft_{name}_ms"], found[f"floor_{name}_ms"]
        print(
            f"  added TTFT {name} at 500 rps   {ttft - floor_ms:10.2f} ms goal   {goal} (through the gateway {ttft:.2f}, floor {floor_ms:.2f})"
        )
    print(
        f"  RSS with 2,000 idle streams {found['rss_2000_idle_mb']:10.0f} MB goal 300 (idle server: {found['rss_mb']:.0f})"
    )


if __name__ == "__main__":
    main()
