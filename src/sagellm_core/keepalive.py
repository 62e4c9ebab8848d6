"""An engine that gives its memory back when nobody has asked for a while, and loads again when somebody does."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, Histogram, TokenDelta
from sagellm_protocol.errors import SageError, UnavailableError
from sagellm_protocol.ports import EngineClient
from sagellm_protocol.prefix import BlockEvent, BlockSnapshot

__all__ = ["KeepAliveEngine"]

_log = logging.getLogger(__name__)

_NOW = (
    "blocks_cached", "blocks_spilled", "blocks_total", "blocks_used", "draining", "engine_id", "phase", "rss_bytes", "running",
    "spill_bytes", "waiting",
)  # fmt: skip
"""Fields of a status that say what is; all others only grow and are carried over a reload."""

_FORWARDED = ("discard_kv", "embed", "export_kv", "import_kv")


class KeepAliveEngine:
    """`EngineClient` over an engine that is closed after `keep_alive_s` idle seconds and built again on demand.

    What it describes stays the same; its counters go on; its prefix cache starts afresh, which `block_events` says by ``cleared``.

    Args:
        engine: the engine, loaded.
        description: of it.
        build: makes it again; runs on a thread, may take long and raise `SageError`, which then fails the request that asked.
        keep_alive_s: idle seconds.
    """

    def __init__(
        self,
        engine: EngineClient,
        description: EngineDescription,
        build: Callable[[], EngineClient],
        keep_alive_s: float,
    ) -> None:
        self._engine: EngineClient | None = engine
        self._description = description
        self._build = build
        self._keep_alive_s = keep_alive_s
        self._users = 0
        self._waiting = 0
        self._before = EngineStatus(engine_id=description.engine_id)
        self._events_before = 0
        self._loading = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._unloading: asyncio.Task[None] | None = None
        self._closed = False
        self._adapters: dict[str, str] = {}
        own = {
            "block_events": self._block_events,
            "block_snapshot": self._block_snapshot,
            "load_adapter": self._load_adapter,
            "unload_adapter": self._unload_adapter,
        }
        forwarded = {name: partial(self._forward, name) for name in _FORWARDED}
        self._optional = {name: method for name, method in (own | forwarded).items() if hasattr(engine, name)}
        self._start_timer()

    @property
    def engine_id(self) -> str:
        """The engine's name."""
        return self._description.engine_id

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._engine is not None

    async def describe(self) -> EngineDescription:
        """Return what the engine serves, loaded or not."""
        return self._description

    async def status(self) -> EngineStatus:
        """Return what the engine is doing; requests that wait for the model count as waiting."""
        if self._engine is not None:
            return _sum(await self._engine.status(), self._before, "ready")
        phase = "loading" if self._waiting else "unloaded"
        return _sum(EngineStatus(engine_id=self.engine_id, waiting=self._waiting), self._before, phase)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one sequence; loads the model first if it has to."""
        async with self._use() as engine, aclosing(engine.stream(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def abort(self, request_id: str) -> bool:
        """Abort a sequence by id; False if the engine does not hold it."""
        return await self._engine.abort(request_id) if self._engine is not None else False

    def __getattr__(self, name: str) -> Any:
        """Offer what the engine offers besides `EngineClient`, and nothing else."""
        method = self.__dict__.get("_optional", {}).get(name)  # not there yet while `__init__` runs
        if method is None:
            raise AttributeError(name)
        return method

    async def _load_adapter(self, name: str, path: str) -> None:
        await self._forward("load_adapter", name, path)
        self._adapters[name] = path

    async def _unload_adapter(self, name: str) -> None:
        await self._forward("unload_adapter", name)
        self._adapters.pop(name, None)

    async def _forward(self, name: str, *args: Any) -> Any:
        async with self._use() as engine:
            return await getattr(engine, name)(*args)

    async def _block_events(self, after: int) -> list[BlockEvent]:
        """Return the changes of the prefix cache numbered above `after`; an unload is one ``cleared``."""
        offset = self._events_before
        events = [BlockEvent(seq=offset, kind="cleared")] if offset > after else []
        engine: Any = self._engine
        if engine is None:
            return events
        later: list[BlockEvent] = await engine.block_events(max(0, after - offset))
        return events + [msgspec.structs.replace(event, seq=event.seq + offset) for event in later]

    async def _block_snapshot(self) -> BlockSnapshot:
        engine: Any = self._engine
        if engine is None:
            return BlockSnapshot(seq=self._events_before, names=())
        offset = self._events_before
        snapshot: BlockSnapshot = await engine.block_snapshot()
        return BlockSnapshot(seq=snapshot.seq + offset, names=snapshot.names)

    async def close(self) -> None:
        """End the engine. Idempotent."""
        self._closed = True
        self._stop_timer()
        if self._unloading is not None:
            await asyncio.wait([self._unloading])
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    @asynccontextmanager
    async def _use(self) -> AsyncIterator[EngineClient]:
        """Hold the engine loaded."""
        self._users += 1
        self._stop_timer()
        try:
            yield await self._loaded()
        finally:
            self._users -= 1
            if self._users == 0 and not self._closed:
                self._start_timer()

    async def _loaded(self) -> EngineClient:
        self._waiting += 1
        try:
            async with self._loading:
                if self._closed:
                    raise UnavailableError("the engine was closed")
                if self._engine is None:
                    _log.info("loading %s again", self._description.model)
                    self._engine = await self._reload()
                return self._engine
        finally:
            self._waiting -= 1

    async def _reload(self) -> EngineClient:
        engine: Any = await asyncio.to_thread(self._build)
        try:
            for name, path in self._adapters.items():
                await engine.load_adapter(name, path)
        except SageError:
            await engine.close()
            raise
        reloaded: EngineClient = engine
        return reloaded

    def _idle(self) -> bool:
        return self._users == 0

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(self._keep_alive_s, self._expired)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        self._timer = None
        if self._engine is not None and self._users == 0:
            self._unloading = asyncio.get_running_loop().create_task(self._unload())

    async def _unload(self) -> None:
        async with self._loading:
            if self._engine is None or not self._idle():
                return
            engine: Any = self._engine
            before = _sum(await engine.status(), self._before, "unloaded")
            events = await engine.block_events(0) if "block_events" in self._optional else []
            if not self._idle():  # somebody came while we asked
                return
            self._before = before
            self._events_before += (events[-1].seq if events else 0) + 1
            self._engine = None
            await engine.close()
            del engine
            gc.collect()  # weights sit in cycles of numpy views; the memory is what this is about
            _log.info("unloaded %s after %g s without work", self._description.model, self._keep_alive_s)


def _sum(now: EngineStatus, before: EngineStatus, phase: str) -> EngineStatus:
    """Return `now` with the counters of earlier lives added."""
    changes: dict[str, Any] = {"phase": phase}
    for name in now.__struct_fields__:
        value = getattr(now, name)
        if name not in _NOW and isinstance(value, (int, float)):
            changes[name] = value + getattr(before, name)
    changes["histograms"] = {
        name: _add(now.histograms.get(name), before.histograms.get(name)) for name in now.histograms | before.histograms
    }
    return msgspec.structs.replace(now, **changes)


def _add(one: Histogram | None, other: Histogram | None) -> Histogram | None:
    if one is None or other is None:
        return one or other
    counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
    return Histogram(bounds=one.bounds, counts=counts, sum=one.sum + other.sum)
