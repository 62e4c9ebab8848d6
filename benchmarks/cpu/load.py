"""A load generator that costs little: while streams run it only notes what arrived when, and reads it afterwards.

It shares the processor with the server that it measures, so what it spends is missing there.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from urllib.parse import urlsplit

_RECEIVE = 1 << 16
_PATIENCE_S = 300.0
_END = b"data: [DONE]"


class _Stream:
    """One request on a connection of its own."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address)
        self.socket.sendall(request)
        self.socket.setblocking(False)
        self.arrivals: list[tuple[float, bytes]] = []
        self._last = b""

    def read(self) -> bool:
        """Take what has arrived; False at the end."""
        data = self.socket.recv(_RECEIVE)
        self.arrivals.append((time.perf_counter(), data))
        ended = not data or _END in self._last + data
        self._last = data[-len(_END) :]
        return not ended

    def events(self) -> list[float]:
        """Return when each event with content came.

        Raises:
            RuntimeError: the server refused, or broke off.
        """
        times: list[float] = []
        rest = b""
        for when, data in self.arrivals:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                    raise RuntimeError(f"a stream failed: {line.decode('latin-1').strip()}")
                if line.startswith(b"data: ") and not line.startswith(_END) and b'"usage":{' not in line:
                    times.append(when)
        if not times or _END not in b"".join(data for _, data in self.arrivals):
            raise RuntimeError(f"a stream broke off after {len(times)} events")
        return times


def _run(url: str, bodies: list[bytes]) -> tuple[float, list[float]]:
    """Return seconds until the last stream ended, and until the first event of each."""
    parts = urlsplit(url)
    address = parts.hostname or "127.0.0.1", parts.port or 80
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: "
    began = time.perf_counter()
    streams = [_Stream(address, f"{head}{len(body)}\r\n\r\n".encode() + body) for body in bodies]
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        while selector.get_map():
            ready = selector.select(_PATIENCE_S)
            if not ready:
                raise RuntimeError(f"nothing arrived for {_PATIENCE_S:g} s")
            for key, _ in ready:
                if not key.data.read():
                    selector.unregister(key.fileobj)
                    key.data.socket.close()
    total = time.perf_counter() - began
    return total, sorted(stream.events()[0] - began for stream in streams)


def run_streams(base_url: str, model: str, prompts: list[list[int]], n: int, *, reuse: bool = False) -> dict:
    """Send all `prompts` at once to ``/v1/completions`` as streams of `n` tokens; return total seconds, tokens, times to first token.

    `reuse` lets llama.cpp, which has to be told, keep a prompt for the next request.

    Raises:
        RuntimeError: a stream was refused, or broke off.
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
    total, first = _run(base_url.rstrip("/") + "/v1/completions", bodies)
    return {"total_s": total, "tokens": n * len(prompts), "ttft_s": first}
