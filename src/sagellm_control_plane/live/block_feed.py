"""Tells the core what the engines' prefix caches really hold: their own block events, polled, and a snapshot after a gap."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sagellm_control_plane.events import BlocksChanged, BlocksSnapshot
from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.registry import Engine
from sagellm_control_plane.types import EngineState
from sagellm_protocol.errors import SageError
from sagellm_protocol.ports import BlockEventClient, EngineClient
from sagellm_protocol.prefix import BlockEvent

__all__ = ["BlockFeed"]


class _Followed:
    """How far one engine's events have been told. `told` counts what the core was told, since several events go as one."""

    __slots__ = ("client", "seen", "told", "wants_snapshot")

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.seen = 0
        self.told = 0
        self.wants_snapshot = True


class BlockFeed:
    """One task that follows all engines of models with a choice: with a single engine there is nothing to decide.

    An engine is met with a snapshot. One that restarted has a new client and is met afresh. When the core misses something (it
    forgot the engine's blocks on a false alarm, events overran), it asks, and gets a snapshot again.

    Args:
        dispatcher: whose core is told.
        interval_s: between two polls.
    """

    def __init__(self, dispatcher: Dispatcher, interval_s: float = 0.2) -> None:
        self._dispatcher = dispatcher
        self._interval_s = interval_s
        self._followed: dict[str, _Followed] = {}
        self._task: asyncio.Task[None] | None = None
        dispatcher.on_snapshot_wanted = self._snapshot_wanted

    def start(self) -> None:
        """Begin to follow. Idempotent."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="control-plane-blocks")

    async def stop(self) -> None:
        """End it."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def poll(self) -> None:
        """Ask every engine once."""
        engines = self._worth_following()
        self._followed = {engine_id: self._followed[engine_id] for engine_id in engines if engine_id in self._followed}
        await asyncio.gather(*(self._ask(engine) for engine in engines.values()))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self.poll()

    def _worth_following(self) -> dict[str, Engine]:
        by_model: dict[str, list[Engine]] = {}
        for engine in self._dispatcher.registry.all():
            offers = isinstance(engine.client, BlockEventClient)
            if offers and engine.info.state is EngineState.READY:
                by_model.setdefault(engine.info.model_id, []).append(engine)
        return {e.info.engine_id: e for engines in by_model.values() if len(engines) > 1 for e in engines}

    def _snapshot_wanted(self, engine_id: str) -> None:
        followed = self._followed.get(engine_id)
        if followed is not None:
            followed.wants_snapshot = True

    async def _ask(self, engine: Engine) -> None:
        engine_id, client = engine.info.engine_id, engine.client
        assert client is not None
        assert isinstance(client, BlockEventClient)
        followed = self._followed.get(engine_id)
        if followed is None or followed.client is not client:
            followed = self._followed[engine_id] = _Followed(client)
        try:
            if followed.wants_snapshot:
                await self._tell_snapshot(engine_id, followed, client)
                return
            events = await client.block_events(followed.seen)
        except SageError:
            return  # whether the engine is well is the prober's business
        if not events or engine.client is not client:
            return
        if events[0].seq != followed.seen + 1:
            followed.wants_snapshot = True
            return
        followed.seen = events[-1].seq
        followed.told += 1
        self._dispatcher.feed(_joined(engine_id, followed.told, events))

    async def _tell_snapshot(self, engine_id: str, followed: _Followed, client: BlockEventClient) -> None:
        snapshot = await client.block_snapshot()
        followed.wants_snapshot = False
        followed.seen = snapshot.seq
        followed.told += 1
        self._dispatcher.feed(BlocksSnapshot(engine_id, followed.told, snapshot.names))


def _joined(engine_id: str, number: int, events: Sequence[BlockEvent]) -> BlocksChanged:
    """Return what consecutive events come to: of each block only the last one counts."""
    stored: dict[bytes, bool] = {}
    cleared = False
    for event in events:
        if event.kind == "cleared":
            stored.clear()
            cleared = True
            continue
        stored.pop(event.block_hash, None)  # the order of the last change is the order of use
        stored[event.block_hash] = event.kind == "stored"
    return BlocksChanged(
        engine_id,
        number,
        tuple(name for name, there in stored.items() if there),
        tuple(name for name, there in stored.items() if not there),
        cleared,
    )
