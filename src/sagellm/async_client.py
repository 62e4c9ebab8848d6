"""The asyncio client: where a request goes, what its body is, what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, overload

from sagellm.discovery import Endpoint, Kind, find_endpoint, model_kind
from sagellm.results import ChatResult, CompletionResult, Delta, EmbeddingResult
from sagellm.streams import resuming_stream
from sagellm.structured import parse_output, response_format_of, tools_of
from sagellm.transport import HttpTransport, RetryPolicy, Timeouts, Transport
from sagellm_protocol.errors import InvalidArgumentError, ModelNotFoundError, SageError

__all__ = ["AsyncUnifiedInferenceClient", "Messages", "first_model_of", "with_v1"]

Messages = str | Sequence[Mapping[str, Any]]


class AsyncUnifiedInferenceClient:
    """The asyncio client; every method of `UnifiedInferenceClient` with ``await`` before it.

    Args:
        base_url: ends in ``/v1``; None looks for a server (see `sagellm.discovery`).
        default_llm_model: used where a call names none; None asks the server for its first chat model.
        default_embedding_model: the same for `embed`.
        timeout: seconds, or `Timeouts`.
        api_key: sent as a bearer token.
        embedded: run the engine in this process; `default_llm_model` names the model and `base_url` must be None.
        retries: what is sent again when it failed before producing anything.
        mock: with `embedded`, simulate the device; `default_llm_model` then lends its tokenizer and sizes.
        engine: with `embedded`, changes to the engine's configuration, by the names of `EngineConfig` (``{"limits": {"n_ctx": 2048}}``).
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
        if embedded and base_url is not None:
            raise InvalidArgumentError(
                f"embedded=True runs the engine here, base_url={base_url!r} elsewhere: drop one of them",
                param="embedded",
            )
        if engine is not None and not embedded:
            raise InvalidArgumentError(
                "engine configures an embedded engine: pass embedded=True with it", param="engine"
            )
        self._timeouts = Timeouts.of(timeout)
        self._retries = retries or RetryPolicy()
        self._base_url = base_url
        self._api_key = api_key
        self._embedded = embedded
        self._engine = dict(engine or {})
        for name, value in (("retries", retries), ("api_key", api_key)):
            if embedded and value is not None:
                raise InvalidArgumentError(
                    f"{name} belongs to a server, embedded=True has none: drop one of them", param=name
                )
        if mock and not embedded:
            raise InvalidArgumentError(
                "mock=True simulates an engine in this process: pass embedded=True with it, or start the server with "
                "`sage-llm serve --mock`",
                param="mock",
            )
        if mock and default_llm_model not in {None, "mock"}:
            self._engine["backend"] = "mock"
        elif mock:
            default_llm_model = "mock"
        self.default_llm_model = default_llm_model
        self.default_embedding_model = default_embedding_model
        self._transports: dict[str, Transport] = {}
        self._opening: asyncio.Lock | None = None
        self._served: dict[str, str] | None = None

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
    ) -> AsyncUnifiedInferenceClient:
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
    async def create_for_model(
        cls, model_id: str, control_plane_url: str | None = None, *, start_timeout: float = 180.0, **options: Any
    ) -> AsyncUnifiedInferenceClient:
        """Return a client whose default model is `model_id`; the control plane starts an engine if none serves it yet.

        Args:
            model_id: as the server's store knows it.
            control_plane_url: None looks for a server.
            start_timeout: seconds that loading may take.
            options: as for `create`.

        Raises:
            ModelNotFoundError: the server does not have the model.
            DeadlineExceededError: it was not ready in time.
            SageError: what else the server said.
        """
        client = cls.create(control_plane_url, model_id, **options)
        try:
            await client.ensure_model(model_id, timeout=start_timeout)
        except BaseException:
            await client.close()
            raise
        return client

    async def ensure_model(self, model_id: str, *, timeout: float = 180.0) -> None:
        """Ask the control plane to start an engine for `model_id` unless one serves it, and wait until it does.

        Raises:
            ModelNotFoundError: the server does not have the model.
            DeadlineExceededError: it was not ready within `timeout` seconds.
        """
        transport = await self._transport("chat")
        if model_id in await self.models():
            return
        await transport.start_model(model_id, timeout)
        if model_id not in await self.models():
            raise ModelNotFoundError(f"{model_id!r} was started and is not served: see `sage-llm logs`", param="model")

    @overload
    async def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Any) -> ChatResult: ...
    @overload
    async def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> AsyncIterator[Delta]: ...
    async def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        stream: bool = False,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        response_format: Any = None,
        **options: Any,
    ) -> ChatResult | AsyncIterator[Delta]:
        """Continue a conversation.

        Args:
            messages: OpenAI messages, or one string: what the user says.
            model: as the server lists it.
            stream: return an iterator of deltas instead of the whole reply.
            temperature: 0 is greedy.
            max_tokens: the longest reply.
            top_p: share of the probability to draw from.
            tools: OpenAI tool definitions, or functions with annotations and a docstring.
            response_format: an OpenAI response format, or a dataclass, msgspec Struct, TypedDict or pydantic model: then
                ``result.parsed`` is an instance of it.
            options: any other field of the request (``seed``, ``stop``, ``n``, ``logprobs``, …), sent as it is.

        Raises:
            SageError: what the server said, or that it cannot be reached.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        _put(body, temperature=temperature, max_tokens=max_tokens, top_p=top_p, **options)
        if tools is not None:
            body["tools"] = tools_of(tools)
        if response_format is not None:
            body["response_format"] = response_format_of(response_format)
        transport, body["model"] = await self._chat_target(model)
        if stream:
            return resuming_stream(transport, "/chat/completions", body)
        reply, latency_ms = await _timed(transport.post("/chat/completions", body))
        result = ChatResult(reply, latency_ms=latency_ms)
        if response_format is not None and result.text and not result.tool_calls:
            result.parsed = parse_output(response_format, result.text) if _is_json(body["response_format"]) else None
        return result

    @overload
    async def generate(self, prompt: str, *, stream: Literal[False] = False, **options: Any) -> CompletionResult: ...
    @overload
    async def generate(self, prompt: str, *, stream: Literal[True], **options: Any) -> AsyncIterator[Delta]: ...
    async def generate(
        self,
        prompt: str,
        *,
        model: str | None = None,
        stream: bool = False,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
        **options: Any,
    ) -> CompletionResult | AsyncIterator[Delta]:
        """Continue a text; no chat template is applied. Arguments as for `chat`.

        Raises:
            SageError: what the server said, or that it cannot be reached.
        """
        body: dict[str, Any] = {"prompt": prompt}
        _put(body, temperature=temperature, max_tokens=max_tokens, top_p=top_p, **options)
        transport, body["model"] = await self._chat_target(model)
        if stream:
            return resuming_stream(transport, "/completions", body)
        reply, latency_ms = await _timed(transport.post("/completions", body))
        return CompletionResult(reply, latency_ms=latency_ms)

    complete = generate

    async def embed(self, texts: str | Sequence[str], *, model: str | None = None, **options: Any) -> EmbeddingResult:
        """Return a vector for each text; ``result.vectors`` holds them as lists of floats.

        Raises:
            ModelNotFoundError: no embedding model is served.
            SageError: what the server said, or that it cannot be reached.
        """
        transport = await self._transport("embedding")
        model = model or self.default_embedding_model or await first_model_of(transport, "embedding")
        body: dict[str, Any] = {"model": model, "input": texts if isinstance(texts, str) else list(texts)}
        _put(body, **options)
        reply, latency_ms = await _timed(transport.post("/embeddings", body))
        return EmbeddingResult(reply, latency_ms=latency_ms)

    async def models(self) -> list[str]:
        """Return the names of the models that are served."""
        transport = await self._transport("chat")
        return [str(row["id"]) for row in (await transport.get("/models")).get("data", ())]

    async def first_model(self) -> str:
        """Return the model that `chat` uses where none is named.

        Raises:
            ModelNotFoundError: no chat model is served.
        """
        return (await self._chat_target(None))[1]

    async def health(self) -> dict[str, Any]:
        """Return what the server says of itself.

        Raises:
            UnavailableError: it cannot be reached, or it is loading or draining.
        """
        transport = await self._transport("chat")
        return await transport.get("//health")

    async def is_llm_available(self) -> bool:
        """Whether a chat model answers."""
        return await self._serves("chat")

    async def is_embedding_available(self) -> bool:
        """Whether an embedding model answers."""
        return await self._serves("embedding")

    async def get_status(self) -> dict[str, Any]:
        """Return where the client is connected, and what is served there."""
        chat, embedding = await self.is_llm_available(), await self.is_embedding_available()
        return {
            "mode": "embedded" if self._embedded else "http",
            "base_url": getattr(self._transports.get("chat"), "base_url", None),
            "embedding_base_url": getattr(self._transports.get("embedding"), "base_url", None),
            "llm_available": chat,
            "embedding_available": embedding,
            "default_llm_model": self.default_llm_model,
            "default_embedding_model": self.default_embedding_model,
            "models": await self.models() if chat else [],
        }

    async def close(self) -> None:
        """Close connections and end an embedded engine. Idempotent."""
        transports, self._transports = set(self._transports.values()), {}
        for transport in transports:
            await transport.close()

    async def __aenter__(self) -> AsyncUnifiedInferenceClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _serves(self, kind: Kind) -> bool:
        try:
            await first_model_of(await self._transport(kind), kind)
        except SageError:
            return False
        return True

    async def _chat_target(self, model: str | None) -> tuple[Transport, str]:
        transport = await self._transport("chat")
        return transport, model or self.default_llm_model or await first_model_of(transport, "chat")

    async def _transport(self, kind: Kind) -> Transport:
        if kind not in self._transports:
            if self._opening is None:
                self._opening = asyncio.Lock()
            async with self._opening:
                if kind not in self._transports:
                    self._transports[kind] = await self._open(kind)
        return self._transports[kind]

    async def _open(self, kind: Kind) -> Transport:
        if self._embedded:
            for transport in self._transports.values():
                return transport
            from sagellm.embedded import EmbeddedTransport

            embedded = await EmbeddedTransport.start(
                self.default_llm_model, self.default_embedding_model, self._engine, self._timeouts
            )
            # A path is served under the file's name.
            self.default_llm_model, self.default_embedding_model = embedded.model, embedded.embedding_model
            return embedded
        if self._base_url is not None:
            endpoint = Endpoint(self._base_url, None, self._api_key)
        else:
            endpoint = await find_endpoint(kind, api_key=self._api_key)
        if kind == "chat":
            self.default_llm_model = self.default_llm_model or endpoint.model
        else:
            self.default_embedding_model = self.default_embedding_model or endpoint.model
        for transport in self._transports.values():
            if getattr(transport, "base_url", None) == endpoint.base_url:
                return transport
        return HttpTransport(
            endpoint.base_url, api_key=endpoint.api_key, timeouts=self._timeouts, retries=self._retries
        )


async def first_model_of(transport: Transport, kind: Kind) -> str:
    """Return the first model of `kind` that is served there.

    Raises:
        ModelNotFoundError: none is.
    """
    rows = (await transport.get("/models")).get("data", ())
    for row in rows:
        if model_kind(row) == kind:
            return str(row["id"])
    served = ", ".join(str(row["id"]) for row in rows) or "nothing"
    raise ModelNotFoundError(
        f"no {kind} model is served (served: {served}): start one, or name the model", param="model"
    )


def with_v1(url: str) -> str:
    """Return `url` with ``/v1`` at its end."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _put(body: dict[str, Any], **fields: Any) -> None:
    body.update({name: value for name, value in fields.items() if value is not None})


def _is_json(response_format: Mapping[str, Any]) -> bool:
    return response_format.get("type") in {"json_object", "json_schema"}


async def _timed(call: Coroutine[Any, Any, dict[str, Any]]) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    reply = await call
    return reply, (time.perf_counter() - started) * 1000
