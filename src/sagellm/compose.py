"""The composition root: the only place where concrete parts meet.

Everything else asks for ports (`sagellm_protocol.ports`, `sagellm_control_plane.live.lifecycle`); here they are plugged in.

* `start_embedded`: engine, control plane and gateway application in this process (the client, ``sage-llm run``).
* `build_server`: gateway and control plane here, every engine in a process of its own (``sage-llm serve``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm import store
from sagellm.library import StoreLibrary
from sagellm_protocol.errors import InvalidArgumentError, ModelNotFoundError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from sagellm.asgi import AsgiApp
    from sagellm_control_plane.live.follower import FollowerDriver
    from sagellm_control_plane.live.lifecycle import EngineSpec, LifecycleDriver
    from sagellm_control_plane.live.process_driver import ProcessDriver
    from sagellm_control_plane.live.store import Store
    from sagellm_control_plane.manager import ControlPlaneManager
    from sagellm_core.config import EngineConfig
    from sagellm_gateway.config import GatewayConfig
    from sagellm_gateway.context import Gateway
    from sagellm_protocol.ports import ChatModel, EngineClient

__all__ = ["House", "StoreCatalog", "add_local", "build_server", "build_worker", "engine_config", "start_embedded"]

MOCK = "mock"
DEFAULT_CONTEXT = 8192


def engine_config(
    model: str, changes: Mapping[str, Any] | None = None, *, name: str | None = None, shared: bool = False
) -> EngineConfig:
    """Return the configuration of an engine for `model`: a stored name, a path, or ``mock``.

    Args:
        model: what to run.
        changes: fields of `EngineConfig` by name, groups as nested mappings.
        name: what to serve it as; the default is the stored name, or the file's stem.
        shared: `changes` are said for several models: the context is then that of the chat models, an embedding model keeps its own.

    Raises:
        ModelNotFoundError: `model` is not on this machine.
        InvalidArgumentError: `changes` has an unknown field or a value out of range.
    """
    import msgspec

    from sagellm_core.config import EngineConfig

    changes = dict(changes or {})
    if model == MOCK:
        fields: dict[str, Any] = {"model": MOCK, "model_id": name or MOCK}
    else:
        stored = store.resolve(model)
        fields = {"model": str(stored.path), "model_id": name or stored.name}
        if shared and stored.kind == "embedding" and "limits" in changes:
            changes["limits"] = {key: value for key, value in changes["limits"].items() if key != "n_ctx"}
    fields.setdefault("device", {"cache_dir": str(store.home() / "packed")})
    for key, value in changes.items():
        fields[key] = {**fields.get(key, {}), **value} if isinstance(value, Mapping) else value
    try:
        return msgspec.convert(fields, EngineConfig)
    except msgspec.ValidationError as error:
        raise InvalidArgumentError(f"engine configuration: {error}", param="engine") from error


def load_text_side(config: EngineConfig, context_length: int | None = None) -> ChatModel:
    """Return template, tokenizer and parsers of the configured model.

    `context_length` is the engine's; without it the rule of `sagellm_core.config.Limits` applies: what is configured, else the
    model's own, at most 8192.
    """
    wanted = context_length or config.limits.n_ctx
    if config.is_mock:
        from sagellm_core.text.bytes_model import ByteChatModel

        return ByteChatModel(config.served_id, wanted or DEFAULT_CONTEXT)
    from sagellm_core.text import load_chat_model

    model = load_chat_model(Path(config.model), config.served_id, wanted)
    if wanted is None and model.context_length > DEFAULT_CONTEXT:
        model = load_chat_model(Path(config.model), config.served_id, DEFAULT_CONTEXT)
    return model


def _merged(changes: Mapping[str, Any], more: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `changes` with `more` over them, group by group."""
    out = dict(changes)
    for key, value in (more or {}).items():
        old = out.get(key)
        out[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


_TOLD = ("role", "zone", "cost")


class StoreCatalog:
    """The models that can be started here: those given on the command line, and those of the store (a `ModelCatalog`)."""

    def __init__(self, configs: Sequence[EngineConfig], changes: Mapping[str, Any] | None = None) -> None:
        self._given = {config.served_id: config for config in configs}
        self._changes = dict(changes or {})

    def models(self) -> Sequence[str]:
        """Names that `engine_spec` understands."""
        return [*self._given, *(m.name for m in store.installed() if m.name not in self._given)]

    def config(self, model_id: str, options: Mapping[str, Any] | None = None) -> EngineConfig:
        """Return the configuration of an engine for `model_id`, with `options` on top.

        Raises:
            ModelNotFoundError: neither given nor stored.
            InvalidArgumentError: an unknown option.
        """
        given = self._given.get(model_id)
        if given is not None and not options:
            return given
        if given is not None:
            return engine_config(given.model, _merged(self._changes, options), name=model_id, shared=True)
        if model_id not in self.models():
            raise ModelNotFoundError(
                f"model {model_id!r} is not on this machine: sage-llm pull {model_id}; here are {', '.join(self.models()) or 'none'}",
                param="model",
            )
        return engine_config(model_id, _merged(self._changes, options), shared=True)

    def engine_spec(self, model_id: str, engine_id: str, options: Mapping[str, Any]) -> EngineSpec:
        """How to start an engine for `model_id` (see `ModelCatalog`).

        `options` are changes to its configuration, and what the control plane is told of it: ``role``, ``zone``, ``cost``.
        """
        import msgspec

        from sagellm_control_plane.live.lifecycle import EngineSpec

        told = {key: value for key, value in options.items() if key in _TOLD}
        options = {key: value for key, value in options.items() if key not in _TOLD}
        config = msgspec.structs.replace(self.config(model_id, options), engine_id=engine_id)
        return EngineSpec(engine_id=engine_id, model_id=model_id, config=msgspec.to_builtins(config), metadata=told)

    def chat_model(self, model_id: str) -> ChatModel:
        """The text side of `model_id`."""
        return load_text_side(self.config(model_id))


def engine_argv(spec: EngineSpec, address: str, *, keep_alive_s: float = 0.0) -> list[str]:
    """Return the command that runs an engine in its own process, listening on a unix socket or on ``tcp://host:port``.

    With `keep_alive_s` it unloads its model after so many idle seconds, and loads it again when it is asked.
    """
    import msgspec

    config = msgspec.json.encode(spec.config).decode()
    where = ["--tcp", address.removeprefix("tcp://")] if address.startswith("tcp://") else ["--socket", address]
    idle = ["--keep-alive", str(keep_alive_s)] if keep_alive_s else []
    return [sys.executable, "-m", "sagellm_core.server", "--config", config, *where, *idle]


class House:
    """A control plane with its engines, and the application over it."""

    def __init__(
        self,
        manager: ControlPlaneManager,
        models: Sequence[str],
        gateway: GatewayConfig | None = None,
        driver: ProcessDriver | None = None,
    ) -> None:
        self.manager = manager
        self.models = list(models)
        self.engines: list[EngineClient] = []
        self._config = gateway
        self._driver = driver
        self._gateway: Gateway | None = None

    def app(self) -> AsgiApp:
        """Return the gateway's routes over this control plane, for calls from this process: no web framework, no lifespan."""
        from sagellm_gateway.inprocess import application

        return application(self.manager, self._config)

    def server_app(self, beside: Callable[[], AbstractAsyncContextManager[None]]) -> Starlette:
        """Return the gateway's application; `beside` runs within its lifespan, after the control plane has started."""
        from sagellm_gateway.server import create_app

        app = create_app(self.manager, self._config, library=StoreLibrary())
        self._gateway = app.state.gateway
        own = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(started: Starlette) -> AsyncIterator[Any]:
            async with own(started) as state, beside():
                yield state

        app.router.lifespan_context = lifespan
        return app

    def set_ready(self, ready: bool) -> None:
        """Answer ``/ready`` with 200 or 503."""
        if self._gateway is not None:
            self._gateway.ready = ready

    def share(self, peers: FollowerDriver) -> None:
        """Do what other gateways of the port ask, and ask them."""
        if self._gateway is not None:
            peers.on_duty(self._gateway.duty)
            self._gateway.share(peers)

    def key_state(self) -> tuple[bool, str]:
        """Return whether a request needs a key, and one line on who may call."""
        keys = self._gateway.keys.all() if self._gateway is not None else []
        good = sum(key.revoked is None for key in keys)
        if good or (self._config is not None and self._config.require_key):
            return True, f"{good} good, one is needed (sage-llm keys)"
        return False, "none made: whoever reaches this address may call (sage-llm keys add NAME)"

    async def start_engine(self, model_id: str, engine_id: str, options: Mapping[str, Any]) -> str:
        """Start an engine process and wait until it serves; return one line about it. `options` as in `StoreCatalog.engine_spec`.

        Raises:
            SageError: it could not be started; the message has its last words.
        """
        info = await self.manager.request_engine_startup(model_id, engine_id, options)
        client = self.manager.get_engine_info(engine_id)
        return f"{engine_id}: {info.model_id}, pid {client.pid}"

    def drop_begun(self) -> None:
        """End the engines that were begun for a control plane that never started them. Idempotent."""
        if self._driver is not None:
            self._driver.drop_begun()

    async def close(self) -> None:
        """Stop the control plane and all engines."""
        await self.manager.stop()


async def start_embedded(
    model: str | None, embedding_model: str | None = None, changes: Mapping[str, Any] | None = None
) -> House:
    """Load the model(s) into this process and return the running house.

    Raises:
        SageError: a model is missing, damaged, or does not fit.
    """
    from sagellm_control_plane.manager import ControlPlaneManager

    names = [model or store.DEFAULT_MODEL, *([embedding_model] if embedding_model else [])]
    configs = [engine_config(name, changes, shared=len(names) > 1) for name in names]
    manager = ControlPlaneManager(mode="local", catalog=StoreCatalog(configs, changes))
    await manager.start()
    house = House(manager, [config.served_id for config in configs])
    try:
        for config in configs:
            house.engines.append(await add_local(manager, config))
    except BaseException:
        await house.close()
        raise
    return house


async def add_local(manager: ControlPlaneManager, config: EngineConfig) -> EngineClient:
    """Load an engine into this process, register it, and return it.

    Raises:
        SageError: the model is missing, damaged, or does not fit.
    """
    import asyncio

    from sagellm_core.client import local_client

    engine = await asyncio.to_thread(local_client, config)
    description = await engine.describe()
    await manager.add_engine(engine, load_text_side(config, description.context_length))
    return engine


def _engine_store(gateway: GatewayConfig) -> Store | None:
    """Return the store of the engines of the server on this port; None without state."""
    from sagellm_control_plane.live.store import Store

    if gateway.state_path is None:
        return None
    return Store(Path(gateway.state_path).with_name(f"engines-{gateway.port}.sqlite"))


def build_worker(
    configs: Sequence[EngineConfig],
    gateway: GatewayConfig,
    driver: LifecycleDriver | None,
    changes: Mapping[str, Any] | None = None,
    *,
    remember: bool = False,
    **policy: Any,
) -> House:
    """Return a house over engines that another process runs: one of several gateways (``sage-llm serve --workers``).

    With `remember`, engines that are registered by address are noted as in `build_server`.
    """
    from sagellm_control_plane.manager import ControlPlaneManager

    known = _engine_store(gateway) if remember else None
    catalog = StoreCatalog(configs, changes)
    manager = ControlPlaneManager(mode="http", driver=driver, catalog=catalog, store=known, **policy)
    return House(manager, [config.served_id for config in configs], gateway)


def build_server(
    configs: Sequence[EngineConfig],
    gateway: GatewayConfig,
    changes: Mapping[str, Any] | None = None,
    *,
    remember: bool = False,
    keep_alive_s: float = 0.0,
    begin: Sequence[tuple[str, str, Mapping[str, Any]]] = (),
    **policy: Any,
) -> House:
    """Return a house whose engines will run in processes of their own.

    Args:
        configs: of the engines that will be started.
        gateway: the gateway's configuration.
        changes: to the configuration of engines that are started later.
        remember: note engines beside the gateway's state, one file for each port, so that after a kill -9 the next server on the
            port takes them over. Without it, or without state, they end with this process.
        keep_alive_s: idle seconds after which an engine unloads its model; 0 is never.
        begin: (model, engine id, options) of engines that load from now on, beside everything else that a start does; `House.start_engine`
            then finds them under way, and `House.drop_begun` ends them if it never comes to that.
        policy: of the control plane.
    """
    from sagellm_control_plane.live.process_driver import ProcessDriver

    known = _engine_store(gateway) if remember else None
    driver = ProcessDriver(partial(engine_argv, keep_alive_s=keep_alive_s), store=known)
    catalog = StoreCatalog(configs, changes)
    for model_id, engine_id, options in begin:
        driver.begin(catalog.engine_spec(model_id, engine_id, options))

    from sagellm_control_plane.manager import ControlPlaneManager  # after the engines: they load while we import

    manager = ControlPlaneManager(mode="http", driver=driver, catalog=catalog, store=known, **policy)
    return House(manager, [config.served_id for config in configs], gateway, driver)
