"""One encoder in this process: inputs of all requests are batched on its own thread."""

from __future__ import annotations

import asyncio
import heapq
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sagellm_core.config import EngineConfig
from sagellm_core.metrics import EngineMetrics, rss_bytes
from sagellm_core.vectors import check_dimensions, embed_result
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SageError,
    UnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sagellm_backend.base import Backend
    from sagellm_backend.encoder import EncodeBatch, EncoderBackend, EncoderRunner, EncoderSpec

    Float32 = npt.NDArray[np.float32]

__all__ = ["EncoderSettings", "LocalEncoder", "build_encoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """What an encoder engine is told besides its runner.

    Attributes:
        engine_id: unique in a control plane.
        model: the name it is served under.
        max_rows: tokens of a batch; one input may be longer.
        max_waiting: inputs that may queue.
        backend, device, model_path: for `describe`.
    """

    engine_id: str
    model: str
    max_rows: int = 2048
    max_waiting: int = 65536
    backend: str = ""
    device: str = ""
    model_path: str = ""


@dataclass(eq=False, slots=True)
class _Job:
    request: EmbedRequest
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[EmbedResult]
    arrival: int
    queued_at: float
    output: str
    next_input: int = 0
    vectors: list[Float32] = field(default_factory=list)

    def __lt__(self, other: _Job) -> bool:
        return (self.request.priority, self.arrival) < (other.request.priority, other.arrival)

    @property
    def n_left(self) -> int:
        return len(self.request.inputs) - self.next_input


class LocalEncoder:
    """`EngineClient` and `EmbeddingClient` over an `EncoderRunner` that this object owns from now on."""

    def __init__(
        self, runner: EncoderRunner, settings: EncoderSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.metrics = EngineMetrics()
        self._runner, self._clock = runner, clock
        self._jobs: list[_Job] = []
        self._running: tuple[_Job, ...] = ()
        self._arrivals = 0
        self._draining = False
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._main, name=f"encoder-{settings.engine_id}", daemon=True)
        self._thread.start()

    # ----------------------------------------------------------- EngineClient

    @property
    def engine_id(self) -> str:
        """The engine's name."""
        return self.settings.engine_id

    async def describe(self) -> EngineDescription:
        """Return what the engine serves; it holds no KV blocks."""
        spec, settings = self._runner.spec, self.settings
        return EngineDescription(
            engine_id=settings.engine_id,
            model=settings.model,
            architecture=spec.architecture,
            backend=settings.backend,
            device=settings.device,
            vocab_size=spec.vocab_size,
            context_length=spec.context_length,
            block_size=0,
            n_blocks=0,
            max_batch_tokens=settings.max_rows,
            max_sequences=settings.max_waiting,
            kind="embedding",
            pid=os.getpid(),
            model_path=settings.model_path,
            weight_bytes=self._runner.weight_bytes,
        )

    async def status(self) -> EngineStatus:
        """Return what the engine is doing; answers also while a batch is computed.

        Raises:
            UnavailableError: it was closed.
        """
        with self._wake:
            if self._closing:
                raise UnavailableError("the engine was closed")
            waiting, running = sum(job.n_left for job in self._jobs), len(self._running)
        metrics = self.metrics
        return EngineStatus(
            engine_id=self.settings.engine_id,
            running=running,
            waiting=waiting,
            steps=metrics.steps,
            prompt_tokens=metrics.prompt_tokens,
            aborted=metrics.aborted,
            finished=metrics.finished,
            failed=metrics.failed,
            rss_bytes=rss_bytes(),
            step_seconds=metrics.step_seconds,
            draining=self._draining,
            histograms=metrics.histograms(),
        )

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Refuse: an encoder generates nothing.

        Raises:
            UnsupportedError: always.
        """
        nothing: tuple[TokenDelta, ...] = ()
        for delta in nothing:  # makes this a generator, as the port wants it
            yield delta
        raise UnsupportedError(
            f"{self.settings.model} is an embedding model and generates nothing: choose a chat model for {request.request_id}",
            param="model",
        )

    async def abort(self, request_id: str) -> bool:
        """Drop a request; False if it is not here or is being computed already."""
        with self._wake:
            jobs = [job for job in self._jobs if job.request.request_id == request_id]
            for job in jobs:
                self._forget(job)
        return bool(jobs)

    async def drain(self) -> None:
        """Take no more requests; those that are here go on to their end."""
        self._draining = True

    async def close(self) -> None:
        """End the thread and free the weights; requests that are open end with an error. Idempotent."""
        self._begin_close()
        await asyncio.to_thread(self._thread.join)

    def close_sync(self) -> None:
        """Like `close`, without an event loop."""
        self._begin_close()
        self._thread.join()

    def _begin_close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()

    # -------------------------------------------------------- EmbeddingClient

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Compute one vector for each input; cancelling the task drops what is not computed yet.

        Raises:
            UnsupportedError: the model cannot do this task or pooling.
            ContextLengthError: an input does not fit.
            InvalidArgumentError: a token id out of the vocabulary, too many dimensions.
            DeadlineExceededError: the request's own deadline passed.
            ResourceExhaustedError: the queue is full.
            UnavailableError: the engine is draining or closed.
        """
        output = self._check(request)
        loop = asyncio.get_running_loop()
        with self._wake:
            self._check_open(len(request.inputs))
            self._arrivals += 1
            job = _Job(request, loop, loop.create_future(), self._arrivals, self._clock(), output)
            heapq.heappush(self._jobs, job)
            self._wake.notify()
        try:
            return await job.future
        except asyncio.CancelledError:
            with self._wake:
                self._forget(job)
            raise

    def _check(self, request: EmbedRequest) -> str:
        """The output that the runner is asked for."""
        spec = self._runner.spec
        if request.adapter is not None:
            raise UnsupportedError("encoders take no adapter: leave it out", param="adapter")
        if request.task == "logprobs" or (request.task == "classify" and not spec.n_labels):
            raise UnsupportedError(
                f"{self.settings.model} has no classifier: it embeds, it does not score", param="model"
            )
        check_dimensions(request, spec.d_model)
        longest = max(len(ids) for ids in request.inputs)
        if longest > spec.context_length:
            raise ContextLengthError(
                f"an input has {longest} tokens, the model takes {spec.context_length}: shorten it", param="input"
            )
        for name, rows, size in (
            ("input", request.inputs, spec.vocab_size),
            ("token_types", request.token_types, max(1, spec.token_types)),
        ):
            wrong = next((n for ids in rows for n in ids if not 0 <= n < size), None)
            if wrong is not None:
                raise InvalidArgumentError(f"{name} holds {wrong}, which is not below {size}", param=name)
        if request.task == "classify":
            return "labels"
        return spec.pooling if request.pooling == "model" else request.pooling

    def _check_open(self, n_inputs: int) -> None:
        if self._closing or self._draining:
            raise UnavailableError("the engine is draining: it takes no more requests")
        waiting = sum(job.n_left for job in self._jobs)
        if waiting + n_inputs > self.settings.max_waiting:
            raise ResourceExhaustedError(
                f"{waiting} inputs are waiting, the queue holds {self.settings.max_waiting}: send fewer, or later",
                retry_after_s=1.0,
            )

    def _forget(self, job: _Job) -> None:
        """Drop a job that is queued; the caller holds the lock."""
        if job in self._jobs:
            self._jobs.remove(job)
            heapq.heapify(self._jobs)
            self.metrics.aborted += 1

    # --------------------------------------------------------------- its thread

    def _main(self) -> None:
        while (parts := self._next_batch()) is not None:
            if parts:
                self._compute(parts)
        with self._wake:
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            _post(job, UnavailableError("the engine was closed"))
        self._runner.close()

    def _next_batch(self) -> list[tuple[_Job, int]] | None:
        """Inputs for one call of the runner, the most urgent first; None when it is time to end."""
        with self._wake:
            while not (self._closing or self._jobs):
                self._wake.wait()
            if self._closing:
                return None
            self._expire()
            parts: list[tuple[_Job, int]] = []
            room = self.settings.max_rows
            while self._jobs and (not parts or self._jobs[0].output == parts[0][0].output):
                job = self._jobs[0]
                size = len(job.request.inputs[job.next_input])
                if parts and size > room:
                    break
                room -= size
                parts.append((job, job.next_input))
                job.next_input += 1
                if not job.n_left:
                    heapq.heappop(self._jobs)
            self._running = tuple({id(job): job for job, _ in parts}.values())
            return parts

    def _expire(self) -> None:
        now = self._clock()
        for job in list(self._jobs):
            limit = job.request.deadline_s
            if limit is not None and now > job.queued_at + limit:
                self._jobs.remove(job)
                self.metrics.failed += 1
                _post(job, DeadlineExceededError(f"the request's deadline of {limit:g} s passed"))
        heapq.heapify(self._jobs)

    def _compute(self, parts: list[tuple[_Job, int]]) -> None:
        started = self._clock()
        batch = _batch(parts)
        try:
            vectors = self._runner.encode(batch)
        except Exception as error:  # noqa: BLE001  the border to the device: whatever it raises must reach the requests
            self._fail(error)
            return
        self.metrics.on_step(batch.token_ids.size, self._clock() - started)
        self.metrics.prompt_tokens += batch.token_ids.size
        for (job, _), vector in zip(parts, vectors, strict=True):
            job.vectors.append(vector)
        for job in self._running:
            if len(job.vectors) == len(job.request.inputs):
                self._finish(job)
        self._running = ()

    def _finish(self, job: _Job) -> None:
        import numpy as np

        self.metrics.finished += 1
        _post(job, embed_result(job.request, np.stack(job.vectors), normalize=self._runner.spec.normalize))

    def _fail(self, error: Exception) -> None:
        known = error if isinstance(error, SageError) else InternalError(f"the device failed: {type(error).__name__}")
        with self._wake:
            self._jobs = [job for job in self._jobs if job not in self._running]
            heapq.heapify(self._jobs)
        for job in self._running:
            self.metrics.failed += 1
            _post(job, known)
        self._running = ()


def _batch(parts: list[tuple[_Job, int]]) -> EncodeBatch:
    import numpy as np

    from sagellm_backend.encoder import EncodeBatch

    rows = [job.request.inputs[index] for job, index in parts]
    types = [
        job.request.token_types[index] if job.request.token_types else (0,) * len(job.request.inputs[index])
        for job, index in parts
    ]
    return EncodeBatch(
        token_ids=np.array([token for ids in rows for token in ids], np.int32),
        token_types=np.array([kind for ids in types for kind in ids], np.int32),
        lengths=np.array([len(ids) for ids in rows], np.int32),
        output=parts[0][0].output,  # type: ignore[arg-type]
    )


def _post(job: _Job, outcome: EmbedResult | SageError) -> None:
    """Hand the outcome to whoever waits for it, on its event loop."""

    def settle() -> None:
        if job.future.done():
            return
        if isinstance(outcome, SageError):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)

    try:
        job.loop.call_soon_threadsafe(settle)
    except RuntimeError:
        return  # its loop is closed: nobody waits


def build_encoder(config: EngineConfig) -> LocalEncoder:
    """Load an encoder engine.

    Raises:
        ResourceExhaustedError: the weights do not fit; the message has both numbers.
        ModelFileError: the model cannot be read.
        UnsupportedError: the backend runs no encoders, or the options ask for something that it lacks.
    """
    from sagellm_backend.base import LoadOptions
    from sagellm_core.loader.encoder import open_encoder

    if config.adapters:
        raise UnsupportedError(
            f"{config.served_id} is an encoder and takes no LoRA adapters: serve it apart from them", param="adapters"
        )
    files = open_encoder(config.model)
    backend, encoders = _backend(config)
    _check_memory(files.spec, backend, config)
    device = config.device
    options = LoadOptions(n_blocks=0, threads=device.threads, quant=device.quant, cache_dir=device.cache_dir)
    settings = EncoderSettings(
        engine_id=config.name,
        model=config.served_id,
        backend=backend.name,
        device=backend.capability().device,
        model_path=config.model,
    )
    return LocalEncoder(encoders.load_encoder(files.spec, files.weights, options), settings)


def _backend(config: EngineConfig) -> tuple[Backend, EncoderBackend]:
    """The backend that is asked for; with ``auto`` the numpy one where the native one runs no encoders."""
    from sagellm_backend.auto import pick
    from sagellm_backend.encoder import EncoderBackend
    from sagellm_backend.reference import ReferenceBackend

    if config.backend == "auto":
        native = pick("cpu") if _runs("cpu") else ReferenceBackend()
        if isinstance(native, EncoderBackend):
            return native, native
        fallback = ReferenceBackend()
        return fallback, fallback
    backend = pick(config.backend)
    if not isinstance(backend, EncoderBackend):
        raise UnsupportedError(f"backend {backend.name!r} runs no encoders: use reference", param="backend")
    return backend, backend


def _runs(name: str) -> bool:
    from sagellm_backend.registry import load

    return load(name).available() is None


def _check_memory(spec: EncoderSpec, backend: Backend, config: EngineConfig) -> None:
    from math import prod

    needed = sum(4 * prod(shape) for shape in spec.slots().values())
    free = config.device.memory_bytes or backend.memory().free
    if needed > free:
        raise ResourceExhaustedError(
            f"{config.served_id} needs {needed / 1e9:.2f} GB for its weights, {free / 1e9:.2f} GB is free: "
            "free some, or choose a smaller model"
        )
