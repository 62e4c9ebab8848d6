"""Memory over time: a real server over the simulated device under mixed load; prints RSS every half minute and its slope.

Run: ``python benchmarks/gateway_soak.py --minutes 10``. Chats, streams, hang-ups, wrong requests and stored responses take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
from typing import Any

import httpx2
import psutil


def rss_mb(pid: int) -> float:
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) / 1e6


async def one(http: httpx2.AsyncClient, draw: random.Random) -> None:
    chat: dict[str, Any] = {
        "model": "mock",
        "messages": [{"role": "user", "content": f"Hi {draw.random()}"}],
        "max_tokens": 40,
    }
    kind = draw.choice(("plain", "stream", "hang up", "wrong", "stored", "tools"))
    if kind == "stream":
        async with http.stream("POST", "/v1/chat/completions", json={**chat, "stream": True}) as answer:
            async for _ in answer.aiter_bytes():
                pass
    elif kind == "hang up":
        async with http.stream(
            "POST", "/v1/chat/completions", json={**chat, "stream": True, "max_tokens": 500}
        ) as answer:
            async for _ in answer.aiter_bytes():
                break
    elif kind == "wrong":
        await http.post("/v1/chat/completions", json={**chat, "model": f"m{draw.random()}"})
    elif kind == "stored":
        await http.post("/v1/responses", json={"model": "mock", "input": "Hi", "max_output_tokens": 20})
    elif kind == "tools":
        tools = [
            {"type": "function", "function": {"name": f"f{draw.randrange(10**6)}", "parameters": {"type": "object"}}}
        ]
        await http.post("/v1/chat/completions", json={**chat, "tools": tools})
    else:
        await http.post("/v1/chat/completions", json=chat)


async def load(url: str, pid: int, minutes: float) -> list[tuple[float, float]]:
    draw = random.Random(7)
    began = time.monotonic()
    points: list[tuple[float, float]] = []
    count = 0
    async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:

        async def worker() -> None:
            nonlocal count
            while time.monotonic() - began < minutes * 60:
                await one(http, draw)
                count += 1

        workers = [asyncio.create_task(worker()) for _ in range(8)]
        while time.monotonic() - began < minutes * 60:
            await asyncio.sleep(30)
            points.append(((time.monotonic() - began) / 60, rss_mb(pid)))
            print(f"{points[-1][0]:6.1f} min  {points[-1][1]:8.1f} MB  {count:8d} requests", flush=True)
        await asyncio.gather(*workers)
    return points


def slope(points: list[tuple[float, float]]) -> float:
    """Return MB a minute over the second half, by least squares."""
    half = points[len(points) // 2 :]
    n = len(half)
    x, y = sum(p[0] for p in half) / n, sum(p[1] for p in half) / n
    spread = sum((p[0] - x) ** 2 for p in half)
    return sum((p[0] - x) * (p[1] - y) for p in half) / spread if spread else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    command = [sys.executable, "-m", "sagellm.cli.main", "serve", "--mock", "--mock-scale", "0", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        url = next(m.group(1) for line in server.stdout if (m := re.search(r"(http://127\.0\.0\.1:\d+)/v1", line)))
        points = asyncio.run(load(url, server.pid, options.minutes))
        print(f"slope over the second half: {slope(points):+.2f} MB a minute")
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
