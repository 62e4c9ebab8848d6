"""`ControlPlaneManager`: the facade that programs know. Thin: the core decides, the parts in `live` do."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import msgspec

from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.decision_log import DecisionLog
from sagellm_control_plane.events import PolicyChanged
from sagellm_control_plane.live import arguments, observe
from sagellm_control_plane.live.adapters import AdapterInfo, Adapters
from sagellm_control_plane.live.block_feed import BlockFeed
from sagellm_control_plane.live.directory import LOCAL_PORTS, Directory
from sagellm_control_plane.live.dispatcher import Dispatcher
from sagellm_control_plane.live.engines import Engines
from sagellm_control_plane.live.foreign import foreign_engine
from sagellm_control_plane.live.lifecycle import ClientFactory, LifecycleDriver, ModelCatalog, RestartPolicy
from sagellm_control_plane.live.probes import Prober
from sagellm_control_plane.live.scaling import Scaling
from sagellm_control_plane.live.serving import Serving
from sagellm_control_plane.policies import policy_named
from sagellm_control_plane.routing import route_named
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.stats import Histogram
from sagellm_control_plane.types import (
    AutoscalerConfig,
    EngineInfo,
    EngineState,
    PDSeparationConfig,
    PerformanceMetrics,
    RequestStatus,
    SchedulingMetrics,
)
from sagellm_protocol.embedding import EmbeddingRequest, EmbedResult, ScoreRequest
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.generation import GenerationEvent, GenerationRequest
from sagellm_protocol.ports import ChatModel, EmbeddingModel, EngineClient
from sagellm_protocol.types import Request, Response, StreamEvent

if TYPE_CHECKING:
    from sagellm_control_plane.live.store import Store

__all__ = ["ControlPlaneManager"]


class ControlPlaneManager:
    """Many engines behind one interface.

    Args:
        scheduling_policy: who goes next among waiting requests (see `sagellm_control_plane.policies`).
        routing_strategy: which engine takes a request (see `sagellm_control_plane.routing`).
        mode: ``http`` also takes engines by address; ``local`` only those in this process or started by `driver`.
        auto_restart: whether engines that we started are started again when they die.
        max_restart_attempts: starts in a row that may fail before an engine is given up.
        restart_policy: both of these and the pauses between starts, in place of them.
        health_check_interval: seconds between probes.
        config: everything else; the names above stand over it.
        driver: starts and stops engines; None if none are to be started from here.
        catalog: which models can be started.
        client_factory: makes clients for engines that are registered by address; the default speaks OpenAI's API over HTTP.
        store: what survives a crash: registered engines, and those that `driver` runs; give the driver the same one.
        enable_pd_separation: compute prompts on one engine and decode on another where that is predicted to be faster; engines
            may have the metadata ``role`` (``prefill``, ``decode``, ``any``).
        pd_config: sizes and speeds of that.
        enable_auto_scaling: start and stop engines by demand (needs `driver` and `catalog`); a model that nobody serves is started
            when it is asked for.
        autoscaler_config: bounds and habits of that.
        engine_file: JSON or TOML with a list ``engines`` of what `register_engine` takes; followed while it changes.
        discover: look for servers of other makers on local ports, and register what they serve.
        decision_log: a binary file to which events and decisions are written.
        seed: of the decisions that draw.

    Raises:
        InvalidArgumentError: an unknown policy, strategy or mode.
    """

    def __init__(
        self,
        scheduling_policy: str | None = None,
        routing_strategy: str | None = None,
        mode: Literal["http", "local"] = "http",
        *,
        auto_restart: bool = True,
        max_restart_attempts: int = 5,
        restart_policy: RestartPolicy | None = None,
        health_check_interval: float | None = None,
        config: CoreConfig | None = None,
        driver: LifecycleDriver | None = None,
        catalog: ModelCatalog | None = None,
        client_factory: ClientFactory | None = None,
        enable_pd_separation: bool = False,
        pd_config: PDSeparationConfig | None = None,
        enable_auto_scaling: bool = False,
        autoscaler_config: AutoscalerConfig | None = None,
        store: Store | None = None,
        engine_file: str | Path | None = None,
        discover: bool = False,
        decision_log: IO[bytes] | None = None,
        seed: int | None = None,
    ) -> None:
        arguments.check_mode(mode, engine_file, discover=discover)
        core = arguments.configured(config or CoreConfig(), scheduling_policy, routing_strategy, health_check_interval)
        core = arguments.separated(core, pd_config, enabled=enable_pd_separation)
        seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        self.mode = mode
        self.config = core
        self._state = ControlState(core, random.Random(seed))  # noqa: S311 - load balancing, not secrets
        log = DecisionLog(decision_log, core, seed) if decision_log is not None else None
        self._dispatcher = Dispatcher(self._state, log=log)
        self._prober = Prober(self._dispatcher, core.health, time.time)
        self._dispatcher.on_probe = self._prober.soon
        self._block_feed = BlockFeed(self._dispatcher)
        self._engines = Engines(
            self._dispatcher,
            self._prober,
            driver=driver,
            catalog=catalog,
            client_factory=client_factory or foreign_engine,
            restart=restart_policy or RestartPolicy(enabled=auto_restart, max_attempts=max_restart_attempts),
            store=store,
        )
        self._adapters = Adapters(self._dispatcher.registry, self._engines.serves)
        self._engines.prepare = self._adapters.prepare
        arguments.check_scaling(driver, catalog, autoscaler_config, enabled=enable_auto_scaling)
        self._scaling = (
            Scaling(self._dispatcher, self._engines, autoscaler_config or AutoscalerConfig())
            if enable_auto_scaling
            else None
        )
        self._driver = driver
        self._directory = Directory(
            self._engines.register,
            self._engines.unregister,
            self._engines.knows,
            file=Path(engine_file) if engine_file is not None else None,
            ports=LOCAL_PORTS if discover else (),
        )
        self._serving = Serving(self._dispatcher, self._engines, self._adapters, self._scaling)
        self._started_at: float | None = None
        self._serial = itertools.count()

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over what an earlier control plane on the same store left, and begin to watch engines. Idempotent.

        Known engines by address that answer within a second are ready when this returns.
        """
        if self._started_at is None:
            self._started_at = time.monotonic()
            self._serving.open()
            await self._engines.recover()
            await self._directory.start()
            self._prober.start()
            self._block_feed.start()
            if self._scaling is not None:
                self._scaling.start()
            await self.settle()

    async def settle(self, timeout_s: float = 1.0) -> None:
        """Wait until engines that were registered by address have been asked once, at most `timeout_s` seconds."""
        await self._prober.settle(timeout_s)

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `grace_s` seconds, then end everything. Idempotent."""
        if self._started_at is None and self._serving.closed:
            return
        await self._serving.close(grace_s)
        if self._scaling is not None:
            await self._scaling.stop()
        await self._directory.stop()
        await self._block_feed.stop()
        await self._prober.stop()
        await self._engines.close()
        self._started_at = None

    # -- engines ---------------------------------------------------------------------------------------------------

    async def add_engine(
        self, client: EngineClient, chat_model: ChatModel | EmbeddingModel, metadata: Mapping[str, Any] | None = None
    ) -> EngineInfo:
        """Register an engine by its client (in this process or elsewhere); it is READY when this returns.

        Raises:
            InvalidArgumentError: its id is registered already.
            UnavailableError: it does not answer.
        """
        return await self._engines.add(client, chat_model, metadata or {})

    def register_engine(
        self,
        engine_id: str,
        model_id: str,
        host: str,
        port: int,
        engine_kind: str = "llm",
        metadata: Mapping[str, Any] | None = None,
    ) -> EngineInfo:
        """Register an engine by its address; it becomes READY when it answers a probe.

        With ``metadata={"lease_s": 30}`` it is forgotten unless `record_engine_heartbeat` is called within that time, again and again.

        Raises:
            InvalidArgumentError: the id is taken, the kind, port or metadata is not valid, or the mode is ``local``.
        """
        if self.mode == "local":
            raise InvalidArgumentError(
                "mode is 'local': engines by address need mode='http'; use add_engine for one in this process",
                param="mode",
            )
        return self._engines.register(engine_id, model_id, host, port, engine_kind, metadata or {})

    def unregister_engine(self, engine_id: str) -> EngineInfo:
        """Forget an engine; requests on it go on elsewhere.

        Raises:
            InvalidArgumentError: nobody registered it.
        """
        return self._engines.unregister(engine_id)

    def get_engine_info(self, engine_id: str) -> EngineInfo:
        """Return one engine.

        Raises:
            InvalidArgumentError: nobody registered it.
        """
        return observe.engine_info(self._dispatcher, self._dispatcher.registry.get(engine_id))

    def list_engines(self, state: EngineState | None = None) -> list[EngineInfo]:
        """Return the engines, all or those in one state."""
        engines = self._dispatcher.registry.all()
        found = [observe.engine_info(self._dispatcher, engine) for engine in engines]
        return [info for info in found if state is None or info.state is state]

    list_registered_engines = list_engines

    def get_engines_for_model(self, model_id: str) -> list[EngineInfo]:
        """Return the engines that serve a model."""
        return [info for info in self.list_engines() if info.model_id == model_id]

    def update_engine_state(self, engine_id: str, state: EngineState) -> EngineInfo:
        """Set an engine's state by hand; READY needs an engine that has answered.

        Raises:
            InvalidArgumentError: unknown engine, or READY for one that never answered.
        """
        return self._engines.set_state_by_hand(engine_id, EngineState(state))

    def record_engine_heartbeat(self, engine_id: str) -> EngineInfo:
        """An engine says by itself that it lives; one that was given up is probed at once."""
        return self._engines.heartbeat(engine_id)

    def record_engine_failure(self, engine_id: str, reason: str = "reported from outside") -> EngineInfo:
        """Somebody saw an engine fail: it gets nothing until a probe has answered, and its requests go on elsewhere."""
        engine = self._dispatcher.registry.get(engine_id)
        self._dispatcher.engine_died(engine_id, reason)
        self._prober.soon(engine_id)
        return engine.info

    def start_engine_drain(self, engine_id: str) -> EngineInfo:
        """Give an engine no new requests; those on it finish."""
        return self._engines.start_drain(engine_id)

    async def stop_engine_gracefully(self, engine_id: str, timeout_s: float = 30.0) -> EngineInfo:
        """Drain an engine and stop it; what still runs after `timeout_s` goes on elsewhere, nothing is lost."""
        return await self._engines.stop_gracefully(engine_id, timeout_s)

    async def request_engine_startup(
        self, model_id: str, engine_id: str | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineInfo:
        """Start an engine through the lifecycle driver and wait until it is READY.

        Raises:
            UnsupportedError: there is no driver.
            ModelNotFoundError: the catalogue does not know the model.
            UnavailableError: it did not become ready; the message has its last words.
        """
        return await self._engines.start_managed(model_id, engine_id, options or {})

    async def request_engine_shutdown(self, engine_id: str, timeout_s: float = 30.0) -> EngineInfo:
        """Drain and stop an engine, and forget it."""
        info = await self._engines.stop_gracefully(engine_id, timeout_s)
        self._dispatcher.forget(engine_id)
        return info

    def prune_stopped_engines(self) -> list[str]:
        """Forget engines that are STOPPED; return their ids."""
        return self._engines.prune()

    def engine_client(self, engine_id: str) -> EngineClient:
        """Return the client of an engine that has answered, for what this facade does not offer.

        Raises:
            InvalidArgumentError: unknown, or it has not answered yet.
        """
        client = self._dispatcher.registry.get(engine_id).client
        if client is None:
            raise InvalidArgumentError(f"engine {engine_id!r} has not answered yet: wait for READY", param="engine_id")
        return client

    def engine_logs(self, engine_id: str, lines: int = 200) -> list[str]:
        """Return the last lines that an engine of ours wrote."""
        self._dispatcher.registry.get(engine_id)
        return list(self._driver.logs(engine_id, lines=lines)) if self._driver is not None else []

    # -- models ----------------------------------------------------------------------------------------------------

    def chat_model(self, model_id: str) -> ChatModel:
        """Return the text side of a served model.

        Raises:
            ModelNotFoundError: no engine serves it.
        """
        return self._engines.chat_model(self._adapters.base_of(model_id))

    def list_models(self) -> list[observe.ModelInfo]:
        """Return the served models."""
        served = observe.models(self._dispatcher, self._engines)
        return [*served, *observe.adapters(served, self._adapters.names())]

    async def load_adapter(self, name: str, path: str, model: str | None = None) -> AdapterInfo:
        """Load a LoRA adapter (a PEFT directory) on all engines of a model; its name then answers like a model's.

        Raises:
            InvalidArgumentError: the name is taken, or `model` is needed to tell several apart.
            ModelNotFoundError: no engine serves the model.
            UnsupportedError: an engine of the model takes no adapters.
            SageError: what an engine says against it.
        """
        return await self._adapters.load(name, path, model)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ModelNotFoundError: there is none of that name.
            InvalidArgumentError: requests use it.
        """
        await self._adapters.unload(name)

    # -- requests --------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Run a request: start, deltas, end. Closing the generator aborts everything.

        Raises:
            SageError: before the first event where possible.
        """
        return self._serving.generate(request)

    async def execute_request(self, request: Request) -> Response:
        """Run a v0.1 request to its end. Failures are in the response's `error`.

        Raises:
            InvalidArgumentError: the request itself is wrong.
        """
        return await self._serving.execute(request)

    def stream_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Run a v0.1 request and yield its events."""
        return self._serving.stream(request)

    async def submit_request(self, request: Request) -> str:
        """Run a v0.1 request in the background and return its id; the result can be asked for by it."""
        return await self._serving.submit(request)

    async def embed(self, request: EmbeddingRequest) -> EmbedResult:
        """Compute vectors; cancelling the awaiting task cancels the work.

        Raises:
            ModelNotFoundError: no engine serves the model.
            UnsupportedError: it gives no vectors.
        """
        return await self._serving.embed(request)

    async def score(self, request: ScoreRequest) -> EmbedResult:
        """Score documents against a query; `sagellm_protocol.embedding.relevance` reads the result.

        Raises:
            ModelNotFoundError: no engine serves the model.
            UnsupportedError: it cannot score.
        """
        return await self._serving.score(request)

    async def get_embeddings(self, texts: Sequence[str], model: str) -> list[list[float]]:
        """Return one vector for each text."""
        request = EmbeddingRequest(request_id=f"emb-{next(self._serial)}", model=model, inputs=tuple(texts))
        return (await self.embed(request)).vectors()

    def get_request_status(self, request_id: str) -> RequestStatus:
        """Return where a request stands.

        Raises:
            InvalidArgumentError: unknown, or it ended long ago.
        """
        return self._serving.status_of(request_id)

    async def get_request_result(self, request_id: str, timeout_s: float | None = None) -> Response:
        """Wait for a submitted request and return its response.

        Raises:
            InvalidArgumentError: unknown, or its result was never kept (it was streamed).
            DeadlineExceededError: it did not end within `timeout_s`; it goes on.
        """
        return await self._serving.result(request_id, timeout_s)

    def cancel_request(self, request_id: str) -> bool:
        """Cancel a request, queued or running; False if it is not under way."""
        return self._serving.cancel(request_id)

    # -- observe ---------------------------------------------------------------------------------------------------

    def get_status(self) -> dict[str, Any]:
        """Return the state of the control plane as plain data."""
        return {
            "running": self._started_at is not None,
            "mode": self.mode,
            "scheduling_policy": self._state.scheduling_policy,
            "routing_strategy": self._state.routing_strategy,
            "uptime_s": self._uptime(),
            "engines": [msgspec.to_builtins(info) for info in self.list_engines()],
            "models": [model.id for model in self.list_models()],
            "active_requests": self._state.active,
            "waiting_requests": self._state.waiting(),
        }

    def get_cluster_status(self) -> dict[str, Any]:
        """Return engines with their load, by model."""
        return observe.cluster_status(self._dispatcher)

    def get_metrics(self) -> PerformanceMetrics:
        """Return what was measured since the start."""
        return observe.performance(self._state, self._uptime())

    def get_scheduling_metrics(self) -> SchedulingMetrics:
        """Return what the scheduler did since the start."""
        return observe.scheduling(self._dispatcher)

    def histograms(self) -> dict[str, Histogram]:
        """Return distributions since the start, in seconds: ``ttft``, ``ttft_error`` (predicted against actual), ``tpot``, ``added``."""
        stats = self._state.stats
        return {"ttft": stats.ttft, "ttft_error": stats.ttft_error, "tpot": stats.tpot, "added": self._dispatcher.added}

    def get_registered_backends(self) -> list[str]:
        """Return the backends of the registered engines."""
        known = (engine.description for engine in self._dispatcher.registry.all())
        return sorted({description.backend for description in known if description is not None})

    def get_engine_health_status(self, engine_id: str | None = None) -> dict[str, Any]:
        """Return health signs of one engine, or of all by id."""
        if engine_id is not None:
            return observe.health(self._dispatcher, self._dispatcher.registry.get(engine_id))
        return {e.info.engine_id: observe.health(self._dispatcher, e) for e in self._dispatcher.registry.all()}

    def get_autoscaler_status(self) -> dict[str, Any]:
        """Return what the autoscaler wants and did, by model."""
        return self._scaling.status() if self._scaling is not None else {"enabled": False}

    def _uptime(self) -> float:
        return 0.0 if self._started_at is None else time.monotonic() - self._started_at

    # -- policy ----------------------------------------------------------------------------------------------------

    def update_policy(self, name: str) -> None:
        """Use another scheduling policy from the next request on.

        Raises:
            InvalidArgumentError: there is none of that name; nothing changes.
        """
        policy_named(name)
        self._dispatcher.feed(PolicyChanged(scheduling_policy=name))

    def update_routing(self, name: str) -> None:
        """Use another routing strategy from the next request on.

        Raises:
            InvalidArgumentError: there is none of that name; nothing changes.
        """
        route_named(name)
        self._dispatcher.feed(PolicyChanged(routing_strategy=name))
