"""Engines of other makers over HTTP: vLLM, SGLang, llama.cpp's server, Ollama, and whatever speaks OpenAI's API."""

from __future__ import annotations

import array
from collections.abc import AsyncGenerator, Mapping
from typing import Any, get_args

import msgspec

from sagellm_control_plane.live.foreign_text import ForeignChatModel
from sagellm_control_plane.live.foreign_wire import Flavour, StreamReader, error_of_status, parse_load, request_body
from sagellm_control_plane.live.http1 import Exchange, Http1Client, HttpBrokenError, HttpRefusedError, Receiver
from sagellm_control_plane.live.runs import DeltaSink, Run, pulled
from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import EngineDiedError, InvalidArgumentError, SageError, UnavailableError, UnsupportedError
from sagellm_protocol.ports import ChatModel, EngineClient

__all__ = ["ForeignEngineClient", "foreign_engine"]

_REFUSAL_BYTES = 65536
#: What a prefix is counted in. We do not see such an engine's own blocks, and finer ones would cost more than they tell.
_BLOCK_TOKENS = 128
_encode = msgspec.json.Encoder().encode

_KNOWN_METADATA = {
    "protocol", "flavour", "scheme", "path", "api_key", "served_model", "slots", "zone", "cost", "role", "device", "context_length",
    "lease_s",
}  # fmt: skip


class ForeignEngineClient:
    """An `EngineClient` over an OpenAI-compatible URL.

    Args:
        engine_id: its name here.
        base_url: up to and with ``/v1``.
        model: its name there.
        flavour: whose server it is: which extra fields it understands, and where its load is found.
        api_key: sent as a bearer token.
        connect_s: how long a connection may take.
        slots: sequences that it runs at once, 0 if unknown.
        kind: ``llm`` or ``embedding``.
    """

    def __init__(
        self,
        engine_id: str,
        base_url: str,
        model: str,
        *,
        flavour: Flavour = "openai",
        api_key: str = "",
        connect_s: float = 5.0,
        slots: int = 0,
        kind: str = "llm",
    ) -> None:
        self._engine_id = engine_id
        self._base_url = base_url.rstrip("/")
        self._model = model
        self._flavour = flavour
        self._slots = slots
        self._kind = kind
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # The server's root: its metrics are not under /v1.
        root, _slash, self._prefix = self._base_url.rpartition("/v1")
        if root:
            self._prefix = "/v1" + self._prefix
        else:
            root, self._prefix = self._base_url, ""
        self._http = Http1Client(root, headers, connect_s=connect_s)
        self._running = 0
        self._received = 0
        self._has_metrics = True

    @property
    def engine_id(self) -> str:
        """The engine's name here."""
        return self._engine_id

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            reply = await self._http.request("GET", path)
        except (HttpRefusedError, HttpBrokenError) as error:
            raise UnavailableError(f"engine {self._engine_id} cannot be reached: {error}") from error
        return reply.status, reply.content

    async def describe(self) -> EngineDescription:
        """Ask which models it serves; ours must be among them.

        Raises:
            UnavailableError: it does not answer, or not with a list of models.
        """
        status, body = await self._get(f"{self._prefix}/models")
        if status != 200:
            raise UnavailableError(f"engine {self._engine_id} answers /models with {status}")
        try:
            rows = msgspec.json.decode(body)["data"]
            row = next((r for r in rows if r["id"] == self._model), None)
            served = ", ".join(str(r["id"]) for r in rows[:8])
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise UnavailableError(f"engine {self._engine_id} answers /models with something else") from error
        if row is None:
            raise UnavailableError(f"engine {self._engine_id} serves {served or 'nothing'}, not {self._model!r}")
        context = row.get("max_model_len") or (row.get("meta") or {}).get("n_ctx_train") or 0
        return EngineDescription(
            engine_id=self._engine_id,
            model=self._model,
            architecture="",
            backend=self._flavour,
            device="remote",
            vocab_size=0,
            context_length=int(context),
            block_size=_BLOCK_TOKENS,
            n_blocks=0,
            max_batch_tokens=0,
            max_sequences=self._slots,
            kind=self._kind,
        )

    async def status(self) -> EngineStatus:
        """Return its load, from its own metrics where it has them, else what we sent.

        Raises:
            UnavailableError: it does not answer.
        """
        load: dict[str, float] = {}
        if self._has_metrics:
            status, page = await self._get("/metrics")
            load = parse_load(page.decode("utf-8", "replace")) if status == 200 else {}
            # A server without the page, or with another one, is not asked again.
            self._has_metrics = bool(load)
        if not load:
            status, _body = await self._get(f"{self._prefix}/models")
            if status >= 500:
                raise UnavailableError(f"engine {self._engine_id} answers /models with {status}")
        usage = load.get("kv_usage")
        return EngineStatus(
            engine_id=self._engine_id,
            running=int(load.get("running", self._running)),
            waiting=int(load.get("waiting", 0)),
            blocks_total=1000 if usage is not None else 0,
            blocks_used=int(usage * 1000) if usage is not None else 0,
            steps=int(load.get("generated", 0)) + self._received,
            generation_tokens=int(load.get("generated", self._received)),
        )

    def push(self, request: EngineRequest, sink: DeltaSink) -> Run:
        """Run one sequence (see `live.runs.PushingClient`); cancelling closes the connection, at which such servers abort."""
        return _Answer(self, request, sink)

    def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one sequence; closing the generator aborts it."""
        return pulled(self.push, request)

    def begin(self, request: EngineRequest, receiver: Receiver) -> Exchange:
        """Send a request.

        Raises:
            UnsupportedError: something that this server cannot do, by name.
        """
        path, body = request_body(request, self._model, self._flavour)
        exchange = self._http.start("POST", self._prefix + path, _encode(body), receiver)
        self._running += 1
        return exchange

    def note_received(self, events: int) -> None:
        """Events of an answer arrived: a sign of progress."""
        self._received += events

    def note_end(self) -> None:
        """An answer ended."""
        self._running -= 1

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Embed texts."""
        if request.task != "embed" or not request.texts:
            raise UnsupportedError("an engine over HTTP embeds texts only", param="task")
        if request.pooling != "model" or request.normalize is not None:
            raise UnsupportedError("pooling and normalize are not supported by an engine over HTTP", param="pooling")
        body: dict[str, Any] = {"model": self._model, "input": list(request.texts), "encoding_format": "float"}
        if request.dimensions is not None:
            body["dimensions"] = request.dimensions
        try:
            reply = await self._http.request("POST", f"{self._prefix}/embeddings", _encode(body))
        except (HttpRefusedError, HttpBrokenError) as error:
            raise EngineDiedError(f"engine {self._engine_id} broke the request: {error}") from error
        if reply.status != 200:
            raise error_of_status(reply.status, reply.content, reply.headers)
        try:
            answer = msgspec.json.decode(reply.content, type=_Embeddings)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise UnavailableError(f"engine {self._engine_id} answers /embeddings with something else") from error
        vectors = [row.embedding for row in sorted(answer.data, key=lambda row: row.index)]
        width = len(vectors[0]) if vectors else 0
        if len(vectors) != len(request.texts) or any(len(vector) != width for vector in vectors):
            raise UnavailableError(
                f"engine {self._engine_id} gave {len(vectors)} vectors for {len(request.texts)} texts"
            )
        data = array.array("f", [number for vector in vectors for number in vector]).tobytes()
        tokens = answer.usage.get("prompt_tokens", 0)
        return EmbedResult(request_id=request.request_id, width=width, data=data, prompt_tokens=tokens)

    async def abort(self, request_id: str) -> bool:
        """Such servers have no abort by id: closing the stream does it."""
        del request_id
        return False

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()


class _Answer:
    """One streamed answer: the receiver of its bytes, and the run that the sequence holds."""

    __slots__ = ("_client", "_exchange", "_headers", "_reader", "_refusal", "_sink", "_status")

    def __init__(self, client: ForeignEngineClient, request: EngineRequest, sink: DeltaSink) -> None:
        self._client = client
        self._sink: DeltaSink | None = sink
        self._status = 0
        self._headers: Mapping[str, str] = {}
        self._refusal = b""
        self._exchange: Exchange | None = None
        chat = request.source is not None and request.source.messages is not None
        self._reader = StreamReader(request.request_id, chat=chat)
        try:
            self._exchange = client.begin(request, self)
        except SageError as error:
            self._sink = None
            sink.ended(error)

    def cancel(self) -> None:
        if self._settle() is not None and self._exchange is not None:
            self._exchange.cancel()

    def _settle(self) -> DeltaSink | None:
        """The answer is over, one way or another: return who is still to be told."""
        sink, self._sink = self._sink, None
        if sink is not None:
            self._client.note_end()
        return sink

    def _fail(self, error: SageError) -> None:
        sink = self._settle()
        if sink is not None:
            sink.ended(error)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status, self._headers = status, headers

    def body(self, data: bytes) -> None:
        if self._status != 200:
            self._refusal = (self._refusal + data)[:_REFUSAL_BYTES]
            return
        try:
            deltas = self._reader.take(data)
        except SageError as error:
            self._fail(error)
            if self._exchange is not None:
                self._exchange.cancel()
            return
        for delta in deltas:
            self._pass_on(delta)

    def _pass_on(self, delta: TokenDelta) -> None:
        self._client.note_received(delta.text_tokens or 1)
        sink = self._sink
        if delta.finish_reason is not None:
            sink = self._settle()
            if self._exchange is not None:
                self._exchange.finish()
        if sink is not None:
            sink.delta(delta)

    def end(self) -> None:
        if self._status != 200:
            self._fail(error_of_status(self._status, self._refusal, self._headers))
            return
        last = self._reader.end()
        if last is not None:
            self._pass_on(last)
        else:
            self._fail(EngineDiedError(f"engine {self._client.engine_id} ended the stream before it was finished"))

    def failed(self, error: HttpRefusedError | HttpBrokenError) -> None:
        if isinstance(error, HttpRefusedError):
            self._fail(UnavailableError(f"engine {self._client.engine_id} refuses connections"))
        else:
            self._fail(EngineDiedError(f"engine {self._client.engine_id} broke the stream: {error}"))


class _Row(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Row]
    usage: dict[str, int] = {}


def foreign_engine(
    engine_id: str, model_id: str, host: str, port: int, metadata: Mapping[str, Any]
) -> tuple[EngineClient, ChatModel]:
    """Return client and text side of an engine at ``http://host:port/v1`` (a `ClientFactory`).

    `metadata` may set `flavour` (openai, vllm, sglang, llamacpp, ollama), `scheme`, `path`, `api_key`, `served_model` (its
    name there), `slots` and `context_length`, besides what the registry reads.

    Raises:
        InvalidArgumentError: an unknown flavour or key.
    """
    unknown = sorted(set(metadata) - _KNOWN_METADATA)
    if unknown:
        raise InvalidArgumentError(
            f"metadata has {', '.join(unknown)}: known are {', '.join(sorted(_KNOWN_METADATA))}", param="metadata"
        )
    flavour = metadata.get("flavour", "openai")
    if flavour not in get_args(Flavour):
        raise InvalidArgumentError(
            f"flavour is {flavour!r}: use one of {', '.join(get_args(Flavour))}", param="metadata"
        )
    address = f"[{host}]" if ":" in host else host
    client = ForeignEngineClient(
        engine_id,
        f"{metadata.get('scheme', 'http')}://{address}:{port}{metadata.get('path', '/v1')}",
        str(metadata.get("served_model", model_id)),
        flavour=flavour,
        api_key=str(metadata.get("api_key", "")),
        slots=int(metadata.get("slots", 0)),
        kind=str(metadata.get("kind", "llm")),
    )
    return client, ForeignChatModel(model_id, int(metadata.get("context_length", 0)))
