"""LoRA adapters of served models: loaded on all engines of a model, addressed by their name in place of the model's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from sagellm_control_plane.live.registry import Engine, EngineRegistry
from sagellm_control_plane.types import EngineState
from sagellm_protocol.embedding import EmbeddingRequest, ScoreRequest
from sagellm_protocol.errors import InvalidArgumentError, ModelNotFoundError, SageError, UnsupportedError
from sagellm_protocol.generation import GenerationRequest
from sagellm_protocol.ports import EngineClient

__all__ = ["AdapterClient", "AdapterInfo", "Adapters"]

_log = logging.getLogger(__name__)

_R = TypeVar("_R", GenerationRequest, EmbeddingRequest, ScoreRequest)


@runtime_checkable
class AdapterClient(Protocol):
    """What the client of an engine that takes adapters offers besides its other methods."""

    async def load_adapter(self, name: str, path: str) -> None:
        """Load the PEFT directory `path` (of the engine's machine) as `name`."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget it."""
        ...


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that was loaded at run time."""

    name: str
    model: str
    path: str


class Adapters:
    """Which adapters there are, and on which model.

    Those that engines were started with are known from what the engines report; those that were loaded here are loaded again on
    every engine of the model that starts later.
    """

    def __init__(self, registry: EngineRegistry, serves: Callable[[str], bool]) -> None:
        self._registry, self._serves = registry, serves
        self._loaded: dict[str, AdapterInfo] = {}

    def names(self) -> dict[str, str]:
        """Adapter -> model, of all adapters that can be used now."""
        found = {info.name: info.model for info in self._loaded.values()}
        for engine in self._registry.all():
            if engine.info.state is EngineState.READY and engine.status is not None:
                found |= dict.fromkeys(engine.status.adapters, engine.info.model_id)
        return found

    def base_of(self, name: str) -> str:
        """Return the model that the adapter `name` belongs to; any other name as it is."""
        if self._serves(name):
            return name
        return self.names().get(name, name)

    def applied(self, request: _R) -> _R:
        """Return a request for an adapter's name as one for its model with the adapter."""
        if self._serves(request.model):
            return request
        base = self.base_of(request.model)
        if base == request.model:
            return request
        return msgspec.structs.replace(request, model=base, adapter=request.model)

    async def load(self, name: str, path: str, model: str | None) -> AdapterInfo:
        """Load an adapter on all engines of a model; on all or on none.

        Raises:
            InvalidArgumentError: the name is taken, or the model is needed to tell several apart.
            ModelNotFoundError: no engine serves the model.
            UnsupportedError: an engine of the model takes no adapters.
            SageError: what an engine says against it.
        """
        model = model or self._only_model()
        if self._serves(name) or name in self.names():
            raise InvalidArgumentError(
                f"{name!r} is the name of a model or an adapter already: choose another", param="name"
            )
        done: list[AdapterClient] = []
        try:
            for client in self._clients(model):
                await client.load_adapter(name, path)
                done.append(client)
        except SageError:
            await asyncio.gather(*(client.unload_adapter(name) for client in done), return_exceptions=True)
            raise
        self._loaded[name] = AdapterInfo(name=name, model=model, path=path)
        return self._loaded[name]

    async def unload(self, name: str) -> None:
        """Forget an adapter on all engines of its model.

        Raises:
            ModelNotFoundError: there is none of that name.
            InvalidArgumentError: sequences use it.
        """
        model = self.names().get(name)
        if model is None:
            known = ", ".join(sorted(self.names())) or "none"
            raise ModelNotFoundError(f"adapter {name!r} is not loaded; loaded are: {known}", param="name")
        for client in self._clients(model):
            await client.unload_adapter(name)
        self._loaded.pop(name, None)
        for engine in self._registry.of_model(model):
            if engine.status is not None:  # its last report is older than this
                left = tuple(other for other in engine.status.adapters if other != name)
                engine.status = msgspec.structs.replace(engine.status, adapters=left)

    async def prepare(self, engine: Engine, client: EngineClient) -> None:
        """Load on an engine that is about to serve what its siblings have; a failure is logged, the base model serves."""
        for info in self._loaded.values():
            if info.model != engine.info.model_id or not isinstance(client, AdapterClient):
                continue
            try:
                await client.load_adapter(info.name, info.path)
            except SageError as error:
                _log.warning("adapter %s is not on engine %s: %s", info.name, engine.info.engine_id, error.message)

    def _only_model(self) -> str:
        models = sorted({e.info.model_id for e in self._registry.all() if e.info.engine_kind == "llm"})
        if len(models) != 1:
            raise InvalidArgumentError(
                f"{len(models)} models are served ({', '.join(models)}): say for which the adapter is", param="model"
            )
        return models[0]

    def _clients(self, model: str) -> Sequence[AdapterClient]:
        serving: list[Any] = [
            engine.client for engine in self._registry.of_model(model) if engine.info.state is EngineState.READY
        ]
        if not serving:
            raise ModelNotFoundError(f"no engine serves {model!r} now", param="model")
        if not all(isinstance(client, AdapterClient) for client in serving):
            raise UnsupportedError(f"an engine of {model!r} takes no adapters", param="model")
        return serving
