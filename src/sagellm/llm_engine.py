"""`LLMEngine` and its factories, as isagellm 0.2 - 0.5 had them: one engine in this process, asked in the words of protocol v0.1.

New code uses `UnifiedInferenceClient(embedded=True)`; this class is for programs that were written against the old one. It is the
same engine behind the same control plane, and the fields of `LLMEngineConfig` that have no meaning any more are refused by name.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sagellm_protocol.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from sagellm_protocol.generation import ChatMessage
from sagellm_protocol.sampling import SamplingParams
from sagellm_protocol.types import Request, Response, StreamEvent

if TYPE_CHECKING:
    from sagellm.compose import House
    from sagellm_backend.base import Backend
    from sagellm_core.config import EngineConfig

__all__ = ["BackendConfig", "LLMEngine", "LLMEngineConfig", "MockEngine", "create_backend", "create_engine"]


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Which backend; `kind` is a name of `sagellm_backend.registry` or ``auto``, `device` may only repeat it."""

    kind: str = "auto"
    device: str | None = None


@dataclass(slots=True)
class LLMEngineConfig:
    """An engine in the words of isagellm 0.5.

    Attributes:
        model_path: a file, a directory, a name of the model store, or ``mock``.
        backend_type: name of a backend, or ``auto``.
        max_batch_size: sequences that run at the same time.
        max_model_len: tokens of one sequence, prompt and output.
        max_new_tokens: of a call that names no limit.
        quantization: ``q4``, ``q8``, ``bf16``, ``f32``, or None to keep the file's.
        enable_prefix_cache: keep prompts findable.
        engine_id: name of the engine; None is the model's.

    The other fields are those of the old class whose only accepted value is the default.
    """

    model_path: str
    backend_type: str = "auto"
    max_batch_size: int = 16
    max_model_len: int | None = None
    max_new_tokens: int = 128
    quantization: str | None = None
    enable_prefix_cache: bool = True
    engine_id: str | None = None
    device: str | None = None
    dtype: str = "auto"
    comm_type: str = "auto"
    task_type: str = "text-generation"
    pooling_strategy: str = "mean"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    trust_remote_code: bool = False
    enable_kv_cache: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    _ONLY_DEFAULT = (
        "dtype",
        "comm_type",
        "task_type",
        "pooling_strategy",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "trust_remote_code",
        "enable_kv_cache",
    )

    def __post_init__(self) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for name in self._ONLY_DEFAULT:
            value = getattr(self, name)
            if value != defaults[name]:
                raise UnsupportedError(f"{name} is {value!r}: only {defaults[name]!r} is possible here", param=name)

    def changes(self) -> dict[str, Any]:
        """Return the fields as changes of an `EngineConfig`."""
        return {
            "backend": _backend_name(self.backend_type, self.device),
            "engine_id": self.engine_id or "",
            "limits": {"parallel": self.max_batch_size, "n_ctx": self.max_model_len},
            "device": {"quant": self.quantization or "auto"},
            "cache": {"prefix_caching": self.enable_prefix_cache},
        }


class LLMEngine:
    """One engine in this process; ``async with`` or `start` and `stop`."""

    def __init__(self, config: LLMEngineConfig | EngineConfig) -> None:
        self.config = config
        self._house: House | None = None

    @property
    def model(self) -> str:
        """The name that requests use.

        Raises:
            UnavailableError: the engine is not started.
        """
        return self._started().models[0]

    async def start(self) -> None:
        """Load the model. Idempotent.

        Raises:
            SageError: it is missing, damaged, or does not fit.
        """
        if self._house is not None:
            return
        from sagellm import compose

        if isinstance(self.config, LLMEngineConfig):
            self._house = await compose.start_embedded(self.config.model_path, None, self.config.changes())
            return
        import msgspec

        changes = msgspec.to_builtins(self.config)
        self._house = await compose.start_embedded(changes.pop("model"), None, changes)

    async def stop(self) -> None:
        """Abort what runs and free the model. Idempotent."""
        house, self._house = self._house, None
        if house is not None:
            await house.close()

    async def execute(self, request: Request) -> Response:
        """Run a request to its end; a failure of it is in the response's `error`."""
        return await self._started().manager.execute_request(request)

    async def generate(
        self,
        prompt: str = "",
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        trace_id: str | None = None,
    ) -> Response:
        """Continue `prompt`, or answer `messages`; greedy unless told otherwise, as in the old class."""
        if sampling_params is None:
            sampling_params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
        return await self.execute(self._request(prompt, messages, max_tokens, sampling_params, request_id, trace_id))

    def stream(
        self, prompt_or_request: str | Request, *, max_tokens: int | None = None, request_id: str | None = None
    ) -> AsyncIterator[StreamEvent]:
        """Yield the events of a request, or of the greedy continuation of a text."""
        request = prompt_or_request
        if isinstance(request, str):
            request = self._request(request, None, max_tokens, SamplingParams(temperature=0.0), request_id, None)
        return self._started().manager.stream_request(request)

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a vector of unit length for each text."""
        return await self._started().manager.get_embeddings(texts, self.model)

    async def health_check(self) -> bool:
        """Whether the engine takes requests."""
        return self._house is not None and any(e.is_healthy for e in self._house.manager.list_engines())

    def get_info(self) -> dict[str, Any]:
        """What is served, and how it is doing."""
        return {"model": self.model, **self._started().manager.get_status()}

    async def __aenter__(self) -> LLMEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _started(self) -> House:
        if self._house is None:
            raise UnavailableError("the engine is not started: await engine.start() first")
        return self._house

    def _request(
        self,
        prompt: str,
        messages: Sequence[Mapping[str, str]] | None,
        max_tokens: int | None,
        sampling: SamplingParams,
        request_id: str | None,
        trace_id: str | None,
    ) -> Request:
        if messages is not None and prompt:
            raise InvalidArgumentError("prompt and messages are both given: leave one out", param="prompt")
        limit = self.config.max_new_tokens if isinstance(self.config, LLMEngineConfig) else 128
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        return Request(
            request_id=request_id,
            trace_id=trace_id or request_id,
            model=self.model,
            prompt=None if messages is not None else prompt,
            messages=None if messages is None else tuple(ChatMessage(**m) for m in messages),  # type: ignore[arg-type]
            max_tokens=max_tokens or limit,
            sampling_params=sampling,
        )


class MockEngine(LLMEngine):
    """The engine over the simulated device."""

    def __init__(self, config: LLMEngineConfig | None = None) -> None:
        super().__init__(config or LLMEngineConfig(model_path="mock"))


def create_backend(config: BackendConfig | None = None) -> Backend:
    """Return the backend that `config` names.

    Raises:
        InvalidArgumentError: no backend of that name; the message lists the known ones.
        UnavailableError: it cannot run here.
    """
    from sagellm_backend.auto import pick

    config = config or BackendConfig()
    return pick(_backend_name(config.kind, config.device))


def create_engine(config: LLMEngineConfig | EngineConfig, backend: Backend | None = None) -> LLMEngine:
    """Return an engine that is not started; `backend` decides where it runs, if given."""
    if backend is not None:
        import copy

        import msgspec

        if isinstance(config, LLMEngineConfig):
            config = copy.copy(config)
            config.backend_type = backend.name
        else:
            config = msgspec.structs.replace(config, backend=backend.name)
    return LLMEngine(config)


def _backend_name(kind: str, device: str | None) -> str:
    """``auto`` and ``cpu`` are the names that both generations share; a device may only repeat the kind."""
    name = device.partition(":")[0] if kind == "auto" and device else kind
    if device is not None and device.partition(":")[0] != name:
        raise InvalidArgumentError(f"backend is {kind!r} and device {device!r}: give one of them", param="device")
    return name
