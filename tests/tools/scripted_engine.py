"""An engine at the other end of the wire that follows a script, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from sagellm_control_plane.live.wire_client import WireEngineClient
from sagellm_protocol import EngineDescription, EngineRequest, SamplingParams, TokenDelta, wire

DESCRIPTION = EngineDescription(
    engine_id="e", model="m", architecture="a", backend="b", device="cpu", vocab_size=10, context_length=99, block_size=16,
    n_blocks=4, max_batch_tokens=32, max_sequences=4,
)  # fmt: skip


def request(request_id: str = "r") -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=(1,), sampling=SamplingParams(seed=1, max_tokens=9))


def tokens(stream: int, *ids: int, finish: str | None = None, request_id: str = "r") -> wire.Deltas:
    return wire.Deltas(deltas=((stream, TokenDelta(request_id=request_id, token_ids=ids, finish_reason=finish)),))


class Engine:
    """The other end of one connection, driven by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *messages: object) -> None:
        self.writer.write(b"".join(m if isinstance(m, bytes) else wire.encode_frame(m) for m in messages))

    async def receive(self) -> object:
        size = int.from_bytes(await self.reader.readexactly(4), "big")
        return wire.decode_to_engine(await self.reader.readexactly(size))

    async def welcome(self, methods: tuple[str, ...] = ("abort", "status")) -> wire.Hello:
        hello = await self.receive()
        self.send(wire.Welcome(description=DESCRIPTION, methods=methods, heartbeat_s=1.0))
        return hello


@contextlib.asynccontextmanager
async def engine_that(tmp_path: Path, script: Callable[[Engine], Awaitable[None]], **options):
    """A client of an engine that follows `script` on every connection; a failing script fails the test."""
    path, tasks, failures = str(tmp_path / "e"), [], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        try:
            await script(Engine(reader, writer))
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionResetError):
            pass
        except AssertionError as exc:
            failures.append(exc)
        finally:
            writer.transport.abort()

    server = await asyncio.start_unix_server(serve, path)
    client = WireEngineClient(options.pop("engine_id", "e"), path, **options)
    try:
        yield client
    finally:
        await client.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not failures, failures


async def collect(client: WireEngineClient, request_id: str = "r") -> list[int]:
    return [t async for delta in client.stream(request(request_id)) for t in delta.token_ids]
