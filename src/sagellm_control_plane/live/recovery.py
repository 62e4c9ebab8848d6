"""After a crash: which engines there were, and taking them over or bringing them back."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.types import EngineInfo
from sagellm_protocol.errors import SageError

if TYPE_CHECKING:
    from sagellm_control_plane.live.store import EngineRecord, Store

__all__ = ["EngineBook"]

_log = logging.getLogger(__name__)


class EngineBook:
    """What the store knows about engines; without a store it forgets everything.

    Engines by address stay until they are unregistered. Engines that we run stay until they are stopped, which the orderly end of the
    control plane does too: only a crash leaves them for the next one.

    Args:
        store: where it is written.
        borrowed: the engines that we run are those of another process, which remembers them itself.
    """

    def __init__(self, store: Store | None, *, borrowed: bool = False) -> None:
        self._store = store
        self._borrowed = borrowed

    @property
    def kept(self) -> bool:
        """Whether anything survives."""
        return self._store is not None

    def note(self, info: EngineInfo, spec: EngineSpec | None = None) -> None:
        """Note an engine that should exist from now on."""
        if self._store is None or (self._borrowed and spec is not None):
            return
        from sagellm_control_plane.live.store import EngineRecord

        self._store.put_engine(
            EngineRecord(
                engine_id=info.engine_id,
                model_id=info.model_id,
                kind=info.engine_kind,
                host=info.host,
                port=info.port,
                metadata=dict(info.metadata),
                spec=spec,
                created_at=info.created_at or time.time(),
            )
        )

    def strike(self, engine_id: str) -> None:
        """Note that an engine should not exist any more."""
        if self._store is not None:
            self._store.remove_engine(engine_id)

    def missing(self, present: Callable[[str], bool]) -> list[EngineRecord]:
        """Return the engines that should exist and do not."""
        if self._store is None:
            return []
        wanted = [record for record in self._store.engines() if not (self._borrowed and record.spec is not None)]
        return [record for record in wanted if not present(record.engine_id)]

    async def bring_back(
        self,
        record: EngineRecord,
        *,
        register: Callable[[EngineRecord], object],
        start: Callable[[EngineSpec], Awaitable[object]],
    ) -> None:
        """Register or start one of `missing`; one that cannot be is logged and struck out."""
        try:
            if record.spec is None:
                register(record)
            else:
                await start(record.spec)
        except SageError as error:
            _log.warning("engine %s was here before and cannot be brought back: %s", record.engine_id, error.message)
            self.strike(record.engine_id)
