"""A load generator that costs little: one asyncio protocol a stream, counting server-sent events as they arrive."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class StreamTimes:
    """Seconds from the start of the run at which each event with content came."""

    events: list[float] = field(default_factory=list)
    error: str = ""


class _Stream(asyncio.Protocol):
    def __init__(self, request: bytes, began: float) -> None:
        self.request = request
        self.began = began
        self.times = StreamTimes()
        self.done: asyncio.Future[StreamTimes] = asyncio.get_running_loop().create_future()
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter() - self.began
        self.rest += data
        *lines, self.rest = self.rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data: [DONE]"):
                self.transport.close()
            elif line.startswith(b"data: ") and b'"usage":{' not in line:
                self.times.events.append(now)
            elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                self.times.error = line.decode("latin-1").strip()

    def connection_lost(self, _exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(self.times)


async def _run(url: str, bodies: list[bytes]) -> tuple[float, list[StreamTimes]]:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    streams = []
    for body in bodies:
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        _, stream = await loop.create_connection(
            lambda head=head, body=body: _Stream(head.encode() + body, began), parts.hostname, parts.port
        )
        streams.append(stream)
    times = await asyncio.wait_for(asyncio.gather(*(stream.done for stream in streams)), 300)
    return time.perf_counter() - began, times


def run_streams(base_url: str, model: str, prompts: list[list[int]], n: int, *, reuse: bool = False) -> dict:
    """Send all `prompts` at once to ``/v1/completions`` as streams of `n` tokens; return total seconds, tokens, times to first token.

    `reuse` lets llama.cpp, which has to be told, keep a prompt for the next request.
    """
    bodies = [
        json.dumps(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": n,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "cache_prompt": reuse,
            }
        ).encode()
        for prompt in prompts
    ]
    total, times = asyncio.run(_run(base_url.rstrip("/") + "/v1/completions", bodies))
    bad = next((t.error for t in times if t.error or not t.events), None)
    if bad is not None:
        raise RuntimeError(f"a stream of {base_url} failed: {bad or 'no event'}")
    return {"total_s": total, "tokens": n * len(prompts), "ttft_s": sorted(t.events[0] for t in times)}
