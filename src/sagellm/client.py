"""`UnifiedInferenceClient`: one client for a server, for the control plane, and for an engine in this process."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from sagellm.async_client import AsyncUnifiedInferenceClient, Messages, with_v1
from sagellm.background import BackgroundLoop
from sagellm.results import ChatResult, CompletionResult, Delta, EmbeddingResult
from sagellm.streams import DeltaStream
from sagellm.transport import RetryPolicy, Timeouts

__all__ = ["AsyncUnifiedInferenceClient", "Availability", "DeltaStream", "UnifiedInferenceClient"]

_T = TypeVar("_T")


class Availability(int):
    """A yes or no that may also be called: earlier releases had a property, others a method."""

    def __call__(self) -> bool:
        """Return it as a bool."""
        return bool(self)

    def __repr__(self) -> str:
        return repr(bool(self))


class UnifiedInferenceClient:
    """The client: one class for a server, for the control plane, and (``embedded=True``) for an engine in this process.

    Thread-safe: all calls run on one event loop in a background thread. For the arguments see `AsyncUnifiedInferenceClient`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        default_llm_model: str | None = None,
        default_embedding_model: str | None = None,
        timeout: float | Timeouts | None = 60.0,
        *,
        api_key: str | None = None,
        embedded: bool = False,
        retries: RetryPolicy | None = None,
        engine: Mapping[str, Any] | None = None,
        mock: bool = False,
    ) -> None:
        self._async = AsyncUnifiedInferenceClient(
            base_url,
            default_llm_model,
            default_embedding_model,
            timeout,
            api_key=api_key,
            embedded=embedded,
            retries=retries,
            engine=engine,
            mock=mock,
        )
        self._background: BackgroundLoop | None = None
        self._starting = threading.Lock()

    @classmethod
    def create(
        cls,
        control_plane_url: str | None = None,
        default_llm_model: str | None = None,
        default_embedding_model: str | None = None,
        timeout: float | Timeouts | None = 60.0,
        embedded: bool = False,
        api_key: str | None = None,
        *,
        retries: RetryPolicy | None = None,
        engine: Mapping[str, Any] | None = None,
        mock: bool = False,
    ) -> UnifiedInferenceClient:
        """Return a client of the control plane at `control_plane_url` (with or without ``/v1``); see the class for the rest."""
        return cls(
            with_v1(control_plane_url) if control_plane_url else None,
            default_llm_model,
            default_embedding_model,
            timeout,
            api_key=api_key,
            embedded=embedded,
            retries=retries,
            engine=engine,
            mock=mock,
        )

    create_with_control_plane = create

    @classmethod
    def create_for_model(
        cls, model_id: str, control_plane_url: str | None = None, *, start_timeout: float = 180.0, **options: Any
    ) -> UnifiedInferenceClient:
        """Return a client of `model_id`, started if need be; see `AsyncUnifiedInferenceClient.create_for_model`.

        Raises:
            ModelNotFoundError: the server does not have the model.
            DeadlineExceededError: it was not ready in time.
            SageError: what else the server said.
        """
        client = cls.create(control_plane_url, model_id, **options)
        try:
            client.ensure_model(model_id, timeout=start_timeout)
        except BaseException:
            client.close()
            raise
        return client

    def ensure_model(self, model_id: str, *, timeout: float = 180.0) -> None:
        """Start an engine for `model_id` unless one serves it; see `AsyncUnifiedInferenceClient.ensure_model`.

        Raises:
            ModelNotFoundError: the server does not have the model.
            DeadlineExceededError: it was not ready within `timeout` seconds.
        """
        self._call(self._async.ensure_model(model_id, timeout=timeout))

    @property
    def default_llm_model(self) -> str | None:
        """The model of `chat` and `generate` where a call names none."""
        return self._async.default_llm_model

    @property
    def default_embedding_model(self) -> str | None:
        """The model of `embed` where a call names none."""
        return self._async.default_embedding_model

    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Any) -> ChatResult: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> DeltaStream: ...
    def chat(self, messages: Messages, *, stream: bool = False, **options: Any) -> ChatResult | DeltaStream:
        """Continue a conversation; see `AsyncUnifiedInferenceClient.chat`.

        Raises:
            SageError: what the server said, or that it cannot be reached.
        """
        if stream:
            return self._stream(self._async.chat(messages, stream=True, **options))
        result: ChatResult = self._call(self._async.chat(messages, **options))
        return result

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> CompletionResult: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> DeltaStream: ...
    def generate(self, prompt: str, *, stream: bool = False, **options: Any) -> CompletionResult | DeltaStream:
        """Continue a text; see `AsyncUnifiedInferenceClient.generate`.

        Raises:
            SageError: what the server said, or that it cannot be reached.
        """
        if stream:
            return self._stream(self._async.generate(prompt, stream=True, **options))
        result: CompletionResult = self._call(self._async.generate(prompt, **options))
        return result

    complete = generate

    def embed(self, texts: str | Sequence[str], *, model: str | None = None, **options: Any) -> EmbeddingResult:
        """Return a vector for each text; see `AsyncUnifiedInferenceClient.embed`.

        Raises:
            SageError: what the server said, or that it cannot be reached.
        """
        return self._call(self._async.embed(texts, model=model, **options))

    def models(self) -> list[str]:
        """Return the names of the models that are served."""
        return self._call(self._async.models())

    def first_model(self) -> str:
        """Return the model that `chat` uses where none is named.

        Raises:
            ModelNotFoundError: no chat model is served.
        """
        return self._call(self._async.first_model())

    def health(self) -> dict[str, Any]:
        """Return what the server says of itself.

        Raises:
            UnavailableError: it cannot be reached, or it is loading or draining.
        """
        return self._call(self._async.health())

    @property
    def is_llm_available(self) -> Availability:
        """Whether a chat model answers; true or false by itself, and when it is called."""
        return Availability(self._call(self._async.is_llm_available()))

    @property
    def is_embedding_available(self) -> Availability:
        """Whether an embedding model answers; true or false by itself, and when it is called."""
        return Availability(self._call(self._async.is_embedding_available()))

    def get_status(self) -> dict[str, Any]:
        """Return where the client is connected, and what is served there."""
        return self._call(self._async.get_status())

    def cancel(self) -> None:
        """End every call and every step of a stream that is under way; who waits for one gets `CancelledRequestError`.

        May be called from any thread, and from a signal handler.
        """
        background = self._background
        if background is not None:
            background.cancel_calls()

    def close(self) -> None:
        """Close connections, end an embedded engine and the background thread. Idempotent; a later call opens them again."""
        with self._starting:
            background, self._background = self._background, None
        if background is None:
            return
        try:
            background.call(self._async.close())
        finally:
            background.close()
            self._async._opening = None  # bound to the loop that has ended

    def __enter__(self) -> UnifiedInferenceClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        background = getattr(self, "_background", None)
        if background is not None:
            background.stop()

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return self._running().call(coroutine)

    def _stream(self, opening: Coroutine[Any, Any, AsyncIterator[Delta]]) -> DeltaStream:
        background = self._running()
        return DeltaStream(background.call(opening), background)

    def _running(self) -> BackgroundLoop:
        with self._starting:
            if self._background is None:
                self._background = BackgroundLoop()
            return self._background
