"""The interface between the control plane and whatever starts engines: processes here, Ray or Kubernetes later.

A driver starts an engine, waits until it answers, watches it, starts it again with a growing pause when it dies, and
stops it. It reports each of these to a listener; which requests were lost and where they go on is not its business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from sagellm_protocol.ports import ChatModel, EmbeddingModel, EngineClient

__all__ = ["EngineExit", "EngineSpec", "LifecycleDriver", "LifecycleListener", "ModelCatalog", "RestartPolicy"]


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a dead engine is started again.

    Attributes:
        enabled: whether at all.
        max_attempts: starts in a row that may fail before the engine is given up; a run of `stable_s` resets the count.
        first_delay_s: pause before the first restart; it doubles up to `max_delay_s`.
        max_delay_s: the longest pause.
        stable_s: seconds of service after which the engine counts as sound again.
    """

    enabled: bool = True
    max_attempts: int = 5
    first_delay_s: float = 0.2
    max_delay_s: float = 30.0
    stable_s: float = 30.0


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. `config` is the engine's own configuration; the control plane does not look into it.

    Attributes:
        engine_id, model_id, kind: who it is.
        config: of the engine.
        metadata: what the registry is told about it: ``role``, ``zone`` or ``cost``.
        ready_timeout_s: seconds from the start to the first answer.
        restart: when it is started again.
        gpus: how many are reserved for it and shown to it.
        listen: ``unix``, or ``tcp`` on a reserved loopback port with a token.
    """

    engine_id: str
    model_id: str
    config: Mapping[str, Any]
    kind: str = "llm"
    metadata: Mapping[str, Any] = {}
    ready_timeout_s: float = 180.0
    restart: RestartPolicy = RestartPolicy()
    gpus: int = 0
    listen: Literal["unix", "tcp"] = "unix"


class EngineExit(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine ended.

    Attributes:
        engine_id: which.
        pid: the process that ended, 0 where the driver has none.
        returncode: exit status, negative for a signal, None if unknown.
        reason: one line for people.
        restart_in_s: seconds until it is started again; None when it is not.
    """

    engine_id: str
    pid: int = 0
    returncode: int | None = None
    reason: str = ""
    restart_in_s: float | None = None


class LifecycleListener(Protocol):
    """Who is told. Called on the event loop; must not block."""

    def engine_ready(self, engine_id: str, client: EngineClient, pid: int) -> None:
        """The engine answers (again): use `client` from now on."""
        ...

    def engine_exited(self, event: EngineExit) -> None:
        """The engine ended, wanted or not."""
        ...


class LifecycleDriver(Protocol):
    """Starts and stops engines.

    Attributes:
        borrowed: its engines are those of another process, which remembers them itself.
    """

    borrowed: ClassVar[bool]

    @property
    def name(self) -> str:
        """``process``, ``ray``, ``kubernetes``."""
        ...

    async def start_engine(self, spec: EngineSpec, listener: LifecycleListener) -> EngineClient:
        """Start an engine and wait until it answers; also tells the listener.

        Raises:
            UnavailableError: it ended or did not answer within `spec.ready_timeout_s`; the message has its last words.
            InvalidArgumentError: an engine of that id is running.
        """
        ...

    async def adopt(
        self, listener: LifecycleListener, found: Callable[[EngineSpec], Awaitable[None]]
    ) -> Sequence[EngineSpec]:
        """Take over engines that an earlier driver started and could not stop; return how they were started.

        `found` is awaited for each before the listener is told that it is ready; if it raises `SageError` the engine is ended.
        """
        ...

    def check_stop(self, engine_id: str) -> None:
        """Refuse, before anything is drained, what `stop_engine` would not do.

        Raises:
            UnsupportedError: engines are not stopped from here.
        """
        ...

    async def stop_engine(self, engine_id: str, *, grace_s: float = 10.0) -> None:
        """Ask the engine to end, wait `grace_s`, then kill it. No restart. Idempotent."""
        ...

    async def restart_engine(self, engine_id: str) -> None:
        """Kill an engine that makes no progress; its restart policy brings it back."""
        ...

    def logs(self, engine_id: str, *, lines: int = 200) -> Sequence[str]:
        """The last lines that the engine wrote."""
        ...

    async def close(self) -> None:
        """Stop all engines of this driver."""
        ...


class ModelCatalog(Protocol):
    """Which models can be started, and how; plugged in by the composition root."""

    def models(self) -> Sequence[str]:
        """Names that `engine_spec` understands."""
        ...

    def engine_spec(self, model_id: str, engine_id: str, options: Mapping[str, Any]) -> EngineSpec:
        """How to start an engine for `model_id`.

        Raises:
            ModelNotFoundError: no such model.
            InvalidArgumentError: an option that is unknown.
        """
        ...

    def chat_model(self, model_id: str) -> ChatModel | EmbeddingModel:
        """The text side of `model_id`."""
        ...


ClientFactory = Callable[[str, str, str, int, Mapping[str, Any]], tuple[EngineClient, ChatModel | EmbeddingModel]]
"""(engine_id, model_id, host, port, metadata) -> client and text side of an engine that somebody else started."""
