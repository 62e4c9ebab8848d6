"""A relay between a load generator and a server that notes what crosses the wire, and when: whose numbers are right can then be told.

It takes HTTP/1.1 apart and puts it together again (h11), adds about 0.1 ms to a piece and knows nothing of the tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11


@dataclass
class Exchange:
    """One completion as it crossed the wire; times in seconds."""

    arrived: float
    body: bytes = b""
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0


@contextlib.contextmanager
def tap(url: str) -> Iterator[tuple[str, list[Exchange]]]:
    """Relay a free local port to `url`; yields its URL and the list that every completed completion joins."""
    seen: list[Exchange] = []
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    listening: Future[int] = Future()
    done = threading.Event()

    async def relay() -> None:
        async with await asyncio.start_server(
            lambda r, w: _Relay(r, w, seen).run(host, port), "127.0.0.1", 0
        ) as server:
            listening.set_result(server.sockets[0].getsockname()[1])
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(relay()))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.result()}", seen
    finally:
        done.set()
        thread.join()


class _Relay:
    """One connection: requests one after the other, each answered before the next."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[Exchange]) -> None:
        self._client = reader, writer, h11.Connection(h11.SERVER)
        self._seen = seen

    async def run(self, host: str, port: int) -> None:
        server = (*await asyncio.open_connection(host, port), h11.Connection(h11.CLIENT))
        writers = self._client[1], server[1]
        with contextlib.suppress(h11.RemoteProtocolError, ConnectionError):
            while (exchange := await self._ask(server)) is not None:
                await self._answer(server, exchange)
                if h11.MUST_CLOSE in {self._client[2].our_state, server[2].our_state}:
                    break
                self._client[2].start_next_cycle()
                server[2].start_next_cycle()
        for writer in writers:
            writer.close()

    async def _ask(self, server: Any) -> Exchange | None:
        exchange, path = Exchange(0.0), b""
        while True:
            event = await _event(self._client)
            if isinstance(event, h11.ConnectionClosed):
                return None
            if isinstance(event, h11.Request):
                exchange.arrived, path = time.perf_counter(), event.target
            if isinstance(event, h11.Data):
                exchange.body += bytes(event.data)
            server[1].write(server[2].send(event))
            if isinstance(event, h11.EndOfMessage):
                if path.endswith(b"/completions"):
                    self._seen.append(exchange)
                return exchange

    async def _answer(self, server: Any, exchange: Exchange) -> None:
        while True:
            event = await _event(server)
            now = time.perf_counter()
            self._client[1].write(self._client[2].send(event))
            if isinstance(event, h11.Data):
                _note(exchange, bytes(event.data), now)
            if isinstance(event, h11.EndOfMessage):
                exchange.ended = now
                return


async def _event(side: Any) -> Any:
    reader, _, parser = side
    while (event := parser.next_event()) is h11.NEED_DATA:
        parser.receive_data(await reader.read(1 << 16))
    return event


def _note(exchange: Exchange, data: bytes, now: float) -> None:
    for line in data.splitlines():
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if any(choice.get("text") for choice in chunk.get("choices", ())):
            exchange.pieces.append(now)
        if usage := chunk.get("usage"):
            exchange.prompt_tokens, exchange.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]


def numbers(exchanges: list[Exchange], concurrency: int) -> dict[str, float]:
    """What a load generator reports, from the wire; and three numbers of the load that it really made.

    ``in_flight`` is the mean number of requests under way. ``prefills_met`` is how many others got their first token while a request was
    decoding, on average: on one engine each of them delays it by a prefill. ``think_ms`` is how long after an answer the next request came
    in a closed loop of `concurrency`; what comes in the middle of a step waits for its end, and joins a later one than its neighbours.
    """
    span = max(e.ended for e in exchanges) - min(e.arrived for e in exchanges)
    met = [
        sum(e.pieces[0] < other.pieces[0] < e.pieces[-1] for other in exchanges if other is not e) for e in exchanges
    ]
    arrived, ended = sorted(e.arrived for e in exchanges), sorted(e.ended for e in exchanges)
    return {
        "ttft_ms": 1000 * statistics.mean(e.pieces[0] - e.arrived for e in exchanges),
        "tpot_ms": 1000 * statistics.mean((e.pieces[-1] - e.pieces[0]) / (e.output_tokens - 1) for e in exchanges),
        "output_tokens_per_s": sum(e.output_tokens for e in exchanges) / span,
        "prompt_tokens": statistics.mean(e.prompt_tokens for e in exchanges),
        "in_flight": sum(e.ended - e.arrived for e in exchanges) / span,
        "prefills_met": statistics.mean(met),
        "think_ms": 1000 * statistics.mean(a - e for a, e in zip(arrived[concurrency:], ended, strict=False)),
    }
