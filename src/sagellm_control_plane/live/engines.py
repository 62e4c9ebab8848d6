"""Engines come and go: registration, start and stop through the lifecycle driver, draining."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, cast

import msgspec

from sagellm_control_plane.live.arguments import check_role
from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.lifecycle import (
    ClientFactory,
    EngineExit,
    EngineSpec,
    LifecycleDriver,
    ModelCatalog,
    RestartPolicy,
)
from sagellm_control_plane.live.probes import Prober
from sagellm_control_plane.live.recovery import EngineBook
from sagellm_control_plane.live.registry import Engine
from sagellm_control_plane.types import EngineInfo, EngineState
from sagellm_protocol.errors import (
    InvalidArgumentError,
    ModelNotFoundError,
    SageError,
    UnavailableError,
    UnsupportedError,
)
from sagellm_protocol.ports import ChatModel, EmbeddingModel, EngineClient

if TYPE_CHECKING:
    from sagellm_control_plane.live.store import EngineRecord, Store

__all__ = ["Engines"]

_log = logging.getLogger(__name__)


class Engines:
    """Registers, starts, drains and stops engines; the listener of the lifecycle driver."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        prober: Prober,
        *,
        driver: LifecycleDriver | None,
        catalog: ModelCatalog | None,
        client_factory: ClientFactory,
        restart: RestartPolicy,
        store: Store | None = None,
    ) -> None:
        self._book = EngineBook(store, borrowed=driver is not None and driver.borrowed)
        self._dispatcher = dispatcher
        self._registry = dispatcher.registry
        self._prober = prober
        self._driver = driver
        self._catalog = catalog
        self._client_factory = client_factory
        self._restart = restart
        self._chat_models: dict[str, ChatModel | EmbeddingModel] = {}
        self._text_sides: dict[str, asyncio.Task[None]] = {}
        self._serial = 0
        self._recovered: dict[str, Engine] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.prepare: Callable[[Engine, EngineClient], Awaitable[None]] = _nothing
        dispatcher.on_hung = self._on_hung
        prober.on_round = self.end_leases

    # -- models ----------------------------------------------------------------------------------------------------

    def chat_model(self, model_id: str) -> ChatModel:
        """Return the text side of a model that some engine serves.

        Raises:
            ModelNotFoundError: none does.
            UnsupportedError: it is a model that gives no text.
        """
        model = self.text_side(model_id)
        if not hasattr(model, "prepare"):
            raise UnsupportedError(f"model {model_id!r} gives vectors, not text", param="model")
        return cast("ChatModel", model)

    def embedding_model(self, model_id: str) -> EmbeddingModel:
        """Return the text side of a model that gives vectors.

        Raises:
            ModelNotFoundError: no engine serves the model.
            UnsupportedError: it gives no vectors.
        """
        model = self.text_side(model_id)
        if not isinstance(model, EmbeddingModel):
            raise UnsupportedError(f"model {model_id!r} gives text, not vectors", param="model")
        return model

    def text_side(self, model_id: str) -> ChatModel | EmbeddingModel:
        """Return what prepares requests for a model.

        Raises:
            ModelNotFoundError: no engine serves it.
        """
        model = self._chat_models.get(model_id)
        if model is None:
            known = ", ".join(sorted(self._chat_models)) or "none"
            raise ModelNotFoundError(f"model {model_id!r} is not served here: served are {known}", param="model")
        return model

    def serves(self, model_id: str) -> bool:
        """Whether some registered engine serves a model of that name."""
        return model_id in self._chat_models

    def knows(self, engine_id: str) -> bool:
        """Whether an engine of that id is registered."""
        return self._registry.find(engine_id) is not None

    def startable(self, model_id: str) -> bool:
        """Whether an engine for the model can be started from here."""
        return self._driver is not None and self._catalog is not None and model_id in self._catalog.models()

    def models(self) -> list[str]:
        """Models that some registered engine serves, in the order in which they came: the first is what callers get who name none."""
        return list(self._chat_models)

    # -- engines that others run -----------------------------------------------------------------------------------

    async def add(
        self, client: EngineClient, chat_model: ChatModel | EmbeddingModel, metadata: Mapping[str, Any]
    ) -> EngineInfo:
        """Register an engine by its client; it is READY when this returns."""
        description = await client.describe()
        info = self._info(client.engine_id, chat_model.model_id, description.kind, metadata)
        engine = Engine(info, client=client, description=description)
        self._registry.add(engine)
        self._chat_models[chat_model.model_id] = chat_model
        info.pid = description.pid
        info.last_heartbeat = time.time()
        self._dispatcher.engine_ready(engine, client, fresh=True)
        return info

    def register(
        self,
        engine_id: str,
        model_id: str,
        host: str,
        port: int,
        kind: str,
        metadata: Mapping[str, Any],
        *,
        keep: bool = True,
    ) -> EngineInfo:
        """Register an engine by its address; it is STARTING until it has answered a probe. `keep` notes it in the store."""
        if kind not in ("llm", "embedding"):
            raise InvalidArgumentError(f"engine_kind is {kind!r}: use llm or embedding", param="engine_kind")
        if not 0 < port < 65536:
            raise InvalidArgumentError(f"port is {port}: it must lie in 1-65535", param="port")
        info = self._info(engine_id, model_id, kind, metadata, host=host, port=port)
        engine = Engine(info, lease_s=_lease(metadata), renewed_at=self._dispatcher.clock())
        self._registry.add(engine)
        try:
            engine.client, text_side = self._client_factory(engine_id, model_id, host, port, metadata)
        except SageError:
            self._registry.remove(engine_id)
            raise
        self._chat_models.setdefault(model_id, text_side)
        if keep:
            self._book.note(info)
        if self._prober.running:
            self._prober.soon(engine_id)
        return info

    def heartbeat(self, engine_id: str) -> EngineInfo:
        """An engine says by itself that it lives; one that was given up is probed at once."""
        engine = self._registry.get(engine_id)
        engine.info.last_heartbeat = time.time()
        engine.renewed_at = self._dispatcher.clock()
        engine.missed_probes = 0
        if engine.info.state in (EngineState.ERROR, EngineState.STARTING):
            self._prober.soon(engine_id)
        return engine.info

    def end_leases(self) -> None:
        """Unregister the engines whose lease has run out without a heartbeat."""
        now = self._dispatcher.clock()
        for engine in self._registry.all():
            if engine.lease_s and now - engine.renewed_at > engine.lease_s:
                _log.warning(
                    "engine %s sent no heartbeat for %.1f s: it is forgotten", engine.info.engine_id, engine.lease_s
                )
                self.unregister(engine.info.engine_id)

    def unregister(self, engine_id: str) -> EngineInfo:
        """Forget an engine. Requests on it go on elsewhere; its connection, and its process if it is ours, end in the background."""
        self._check_stop(engine_id)
        engine = self._dispatcher.forget(engine_id)
        self._book.strike(engine_id)
        if engine.spec is not None or engine.client is not None:
            self._in_background(self._let_go(engine, grace_s=0.0))
        return engine.info

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            # Before the event loop runs nothing can have been connected or started.
            work.close()
            return
        task = loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _info(
        self, engine_id: str, model_id: str, kind: str, metadata: Mapping[str, Any], host: str = "", port: int = 0
    ) -> EngineInfo:
        check_role(metadata.get("role", "any"))
        return EngineInfo(
            engine_id=engine_id,
            model_id=model_id,
            host=host,
            port=port,
            engine_kind=kind,
            metadata=dict(metadata),
            created_at=time.time(),
        )

    # -- engines that we run ---------------------------------------------------------------------------------------

    async def start_managed(self, model_id: str, engine_id: str | None, options: Mapping[str, Any]) -> EngineInfo:
        """Start an engine for a model and wait until it is READY."""
        driver, catalog = self._need_driver()
        if engine_id is None:
            engine_id = self._fresh_id(model_id)
        spec = catalog.engine_spec(model_id, engine_id, options)
        # The manager's auto_restart and max_restart_attempts stand above the catalogue's defaults.
        spec = _with_restart(spec, self._restart)
        recovered = self._recovered.pop(engine_id, None)
        if recovered is not None and self._registry.find(engine_id) is recovered:
            if _same_start(recovered.spec, spec):
                return recovered.info
            # Its process must be gone before another one of the same id starts.
            self._dispatcher.forget(engine_id)
            self._book.strike(engine_id)
            await self._let_go(recovered, grace_s=0.0)
        return (await self._start(spec, driver, catalog)).info

    async def _start(self, spec: EngineSpec, driver: LifecycleDriver, catalog: ModelCatalog) -> Engine:
        engine = self._expect(spec)
        engine_id = spec.engine_id
        # The text side loads while the engine does; whoever is told first that the engine answers waits for it.
        text_side = self._text_side_of(spec.model_id, catalog)
        try:
            client = await driver.start_engine(spec, self)
            await asyncio.shield(text_side)
            if engine.description is None:
                engine.description = await client.describe()
            engine.info.engine_kind = engine.description.kind
        except (SageError, asyncio.CancelledError):
            self._dispatcher.forget(engine_id)
            await driver.stop_engine(engine_id, grace_s=0.0)
            raise
        if engine.info.state is not EngineState.READY:
            await self.prepare(engine, client)
            self._ready(engine, client)
        self._book.note(engine.info, spec)
        return engine

    def _expect(self, spec: EngineSpec) -> Engine:
        """Register an engine that is about to start, or that was found running."""
        info = self._info(spec.engine_id, spec.model_id, spec.kind, spec.metadata)
        info.managed = True
        engine = Engine(info, spec=spec)
        self._registry.add(engine)
        return engine

    def _text_side_of(self, model_id: str, catalog: ModelCatalog) -> asyncio.Task[None]:
        """Load the text side of a model unless it is there; engines of one model share the task."""

        async def load() -> None:
            if model_id not in self._chat_models:
                self._chat_models[model_id] = await asyncio.to_thread(catalog.chat_model, model_id)

        task = self._text_sides.get(model_id)
        if task is None:
            task = self._text_sides[model_id] = asyncio.get_running_loop().create_task(load())
            task.add_done_callback(lambda ended: self._text_side_ended(model_id, ended))
        return task

    def _text_side_ended(self, model_id: str, task: asyncio.Task[None]) -> None:
        del self._text_sides[model_id]
        if not task.cancelled():
            task.exception()  # seen: the start that asked may have failed before it looked

    async def recover(self) -> None:
        """Take over the engines of a control plane on the same store that was killed; bring back those that have ended."""
        if not self._book.kept:
            return
        driver, catalog = self._driver, self._catalog

        async def found(spec: EngineSpec) -> None:
            assert catalog is not None
            engine = self._expect(spec)
            try:
                await asyncio.shield(self._text_side_of(spec.model_id, catalog))
            except (SageError, asyncio.CancelledError):
                self._dispatcher.forget(spec.engine_id)
                raise
            self._recovered[spec.engine_id] = engine

        async def start(spec: EngineSpec) -> None:
            self._recovered[spec.engine_id] = await self._start(spec, *self._need_driver())

        if driver is not None and catalog is not None:
            await driver.adopt(self, found)
            await asyncio.gather(*self._tasks)
        records = self._book.missing(lambda engine_id: self._registry.find(engine_id) is not None)
        await asyncio.gather(
            *(self._book.bring_back(record, register=self._register_again, start=start) for record in records)
        )

    def _register_again(self, record: EngineRecord) -> None:
        self.register(record.engine_id, record.model_id, record.host, record.port, record.kind, record.metadata)

    def _need_driver(self) -> tuple[LifecycleDriver, ModelCatalog]:
        if self._driver is None or self._catalog is None:
            raise UnsupportedError(
                "this control plane starts no engines: give it a lifecycle driver and a model catalogue, "
                "or register an engine that runs already"
            )
        return self._driver, self._catalog

    def _fresh_id(self, model_id: str) -> str:
        stem = "".join(c if c.isalnum() or c in "-._" else "-" for c in model_id)
        while True:
            self._serial += 1
            engine_id = f"{stem}-{self._serial}"
            if self._registry.find(engine_id) is None:
                return engine_id

    def engine_ready(self, engine_id: str, client: EngineClient, pid: int) -> None:
        """The driver's engine answers (again)."""
        engine = self._registry.find(engine_id)
        if engine is None:
            return
        if engine.info.pid and engine.info.pid != pid:
            engine.info.restarts += 1
        engine.info.pid = pid
        task = asyncio.get_running_loop().create_task(self._describe_then_ready(engine, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _describe_then_ready(self, engine: Engine, client: EngineClient) -> None:
        try:
            engine.description = await client.describe()
            engine.info.engine_kind = engine.description.kind
        except SageError as error:
            self._dispatcher.engine_died(engine.info.engine_id, error.message, restarting=True)
            return
        await self.prepare(engine, client)
        loading = self._text_sides.get(engine.info.model_id)
        if loading is not None:
            await asyncio.wait([loading])
        if self._registry.find(engine.info.engine_id) is engine and self.serves(engine.info.model_id):
            self._ready(engine, client)

    def _ready(self, engine: Engine, client: EngineClient) -> None:
        engine.info.last_heartbeat = time.time()
        self._dispatcher.engine_ready(engine, client, fresh=True)

    def engine_exited(self, event: EngineExit) -> None:
        """The driver's engine ended, wanted or not."""
        engine = self._registry.find(event.engine_id)
        if engine is None:
            return
        if engine.info.state is EngineState.STOPPED:
            return
        restarting = event.restart_in_s is not None
        _log.warning("engine %s ended: %s", event.engine_id, event.reason or f"status {event.returncode}")
        self._dispatcher.engine_died(
            event.engine_id, event.reason or f"status {event.returncode}", restarting=restarting
        )

    def _on_hung(self, engine_id: str) -> None:
        engine = self._registry.find(engine_id)
        if engine is None or engine.spec is None or self._driver is None:
            return
        task = asyncio.get_running_loop().create_task(self._driver.restart_engine(engine_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the end of an engine --------------------------------------------------------------------------------------

    def start_drain(self, engine_id: str) -> EngineInfo:
        """Give an engine no new requests; those on it finish."""
        engine = self._registry.get(engine_id)
        self._dispatcher.set_state(engine, EngineState.DRAINING)
        return engine.info

    async def stop_gracefully(self, engine_id: str, timeout_s: float) -> EngineInfo:
        """Drain, then stop; what still runs after `timeout_s` goes on elsewhere."""
        engine = self._registry.get(engine_id)
        self._check_stop(engine_id)
        if engine.info.state is EngineState.READY:
            self.start_drain(engine_id)
        if not await self._dispatcher.wait_idle(engine_id, timeout_s):
            late = UnavailableError(f"engine {engine_id} was drained for {timeout_s:.0f} s and is stopped")
            self._dispatcher.fail_attempts(engine_id, late.to_wire())
        self._dispatcher.set_state(engine, EngineState.STOPPED)
        self._book.strike(engine_id)
        await self._let_go(engine, grace_s=10.0)
        return engine.info

    def _check_stop(self, engine_id: str) -> None:
        engine = self._registry.find(engine_id)
        if engine is not None and engine.spec is not None and self._driver is not None:
            self._driver.check_stop(engine_id)

    def set_state_by_hand(self, engine_id: str, state: EngineState) -> EngineInfo:
        """Set a state as an operator wishes."""
        engine = self._registry.get(engine_id)
        if state is EngineState.READY:
            if engine.client is None or engine.description is None:
                raise InvalidArgumentError(
                    f"engine {engine_id!r} has not answered yet: it becomes READY by itself when it does", param="state"
                )
            self._dispatcher.engine_ready(engine, engine.client, fresh=False)
        elif state is EngineState.ERROR:
            self._dispatcher.engine_died(engine_id, "set by hand")
        else:
            self._dispatcher.set_state(engine, state)
        return engine.info

    def prune(self) -> list[str]:
        """Forget engines that are stopped; return their ids."""
        stopped = [e.info.engine_id for e in self._registry.in_state(EngineState.STOPPED)]
        for engine_id in stopped:
            self._dispatcher.forget(engine_id)
        return stopped

    async def _let_go(self, engine: Engine, *, grace_s: float) -> None:
        if engine.spec is not None and self._driver is not None:
            await self._driver.stop_engine(engine.info.engine_id, grace_s=grace_s)
        if engine.client is not None:
            await engine.client.close()

    async def close(self) -> None:
        """Stop everything that we started and let go of the rest."""
        for engine in self._registry.all():
            if engine.info.state is not EngineState.STOPPED:
                self._dispatcher.set_state(engine, EngineState.STOPPED)
            if engine.spec is not None:
                self._book.strike(engine.info.engine_id)
        if self._driver is not None:
            await self._driver.close()
        for engine in self._registry.all():
            if engine.client is not None:
                await engine.client.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _lease(metadata: Mapping[str, Any]) -> float:
    lease = metadata.get("lease_s", 0.0)
    if not isinstance(lease, int | float) or lease < 0 or ("lease_s" in metadata and lease == 0):
        raise InvalidArgumentError(f"lease_s is {lease!r}: it must be a number above 0 seconds", param="metadata")
    return float(lease)


async def _nothing(engine: Engine, client: EngineClient) -> None:
    """There is nothing to prepare."""


def _same_start(one: EngineSpec | None, other: EngineSpec) -> bool:
    return one is not None and msgspec.json.encode(one) == msgspec.json.encode(other)


def _with_restart(spec: EngineSpec, restart: RestartPolicy) -> EngineSpec:
    return msgspec.structs.replace(spec, restart=restart)
