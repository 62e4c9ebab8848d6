from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import httpx2

CHAT: dict[str, Any] = {"model": "mock", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


async def stream(http: httpx2.AsyncClient, k: int, begun: asyncio.Semaphore) -> str:
    body = {**CHAT, "messages": [{"role": "user", "content": f"Hi {k}"}], "max_tokens": 60, "ignore_eos": True}
    text = ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for part in answer.aiter_text():
            if not text:
                begun.release()
            text += part
    return text


def test_sigterm_under_load_loses_nothing(start_server: Callable[..., Any]) -> None:
    """Streams that run when SIGTERM comes end whole, new work is refused meanwhile, and the process exits cleanly."""
    server = start_server("--mock")

    async def scenario() -> list[str]:
        begun = asyncio.Semaphore(0)
        limits = httpx2.Limits(max_connections=100)
        async with httpx2.AsyncClient(base_url=server.root_url, timeout=60, trust_env=False, limits=limits) as http:
            tasks = [asyncio.create_task(stream(http, k, begun)) for k in range(16)]
            for _ in tasks:
                await begun.acquire()
            server.process.send_signal(signal.SIGTERM)
            seen = set()
            for _ in range(200):
                if all(task.done() for task in tasks):
                    break
                try:
                    seen.add((await http.get("/ready")).status_code)
                    seen.add((await http.post("/v1/chat/completions", json={**CHAT, "stream": False})).status_code)
                except httpx2.TransportError:
                    break
                if 503 in seen:
                    break
            assert 503 in seen or all(task.done() for task in tasks)
            return await asyncio.gather(*tasks)

    texts = asyncio.run(scenario())
    for text in texts:
        assert text.endswith("data: [DONE]\n\n"), text[-300:]
        chunks = [json.loads(b[6:]) for b in text.split("\n\n") if b.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) in (0, -signal.SIGTERM)
