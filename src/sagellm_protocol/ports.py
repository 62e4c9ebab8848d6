"""The seams between floors: who needs something says so here, `sagellm.compose` plugs it in."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from sagellm_protocol.embedding import EmbeddingRequest, EmbedRequest, EmbedResult, ScoreRequest
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.generation import ChoiceDelta, GenerationRequest
from sagellm_protocol.handover import KVExportRequest, KVImported, KVTicket
from sagellm_protocol.prefix import BlockEvent, BlockSnapshot

__all__ = [
    "BlockEventClient",
    "ChatModel",
    "EmbeddingClient",
    "EmbeddingModel",
    "EngineClient",
    "KVTransferClient",
    "PreparedRequest",
    "TextDecoder",
]


@runtime_checkable
class EngineClient(Protocol):
    """One engine, wherever it runs: in process, in its own process over the wire, or a foreign server."""

    @property
    def engine_id(self) -> str:
        """The engine's name, unique in a control plane."""
        ...

    async def describe(self) -> EngineDescription:
        """Return what the engine serves.

        Raises:
            UnavailableError: it cannot be reached.
        """
        ...

    async def status(self) -> EngineStatus:
        """Return what the engine is doing now.

        Raises:
            UnavailableError: it cannot be reached.
        """
        ...

    def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Run one sequence. Closing the generator aborts it and frees its blocks within a step.

        A failure of this sequence alone arrives as the last delta's `error`.

        Raises:
            EngineDiedError: the engine ended or the connection broke; deltas may have been emitted before.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """Abort a sequence by id; False if the engine does not hold it."""
        ...

    async def close(self) -> None:
        """Let go of the connection (and of the engine, where it lives in this process). Idempotent."""
        ...


class PreparedRequest(Protocol):
    """A request after templating and tokenisation."""

    @property
    def source(self) -> GenerationRequest:
        """The request it came from."""
        ...

    @property
    def engine_requests(self) -> Sequence[EngineRequest]:
        """One for each choice, ids ``<id>`` (n = 1) or ``<id>/k``; seeds and max_tokens resolved."""
        ...

    @property
    def text(self) -> bytes | None:
        """The prompt as text, by which its prefixes are known where its token ids are not; None where they are."""
        ...


class TextDecoder(Protocol):
    """Token ids of one choice -> text, reasoning and tool calls. Incremental; linear time."""

    def push(self, delta: TokenDelta) -> ChoiceDelta | None:
        """Return what the choice gained, or None when nothing can be shown yet.

        When a stop string matched, the returned delta carries ``finish_reason="stop"`` although the engine goes on:
        the caller aborts the sequence. Text that may be the beginning of a stop string or of an unfinished character is
        held back until it is decided; it is flushed by the delta that finishes the sequence.
        """
        ...


class ChatModel(Protocol):
    """The text side of a model: template, tokenizer, output parsers. Holds no weights; cheap enough for the gateway process."""

    @property
    def model_id(self) -> str:
        """The name it is served under."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens, prompt and output together."""
        ...

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """Sampling that the model's makers recommend (temperature, top_p, top_k, min_p, repetition_penalty).

        From the file's metadata or a ``generation_config.json`` beside it; empty where neither speaks. A dialect uses them for
        parameters that a request leaves out.
        """
        ...

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Template, tokenise and check `request`.

        Raises:
            InvalidArgumentError: empty messages, a parameter out of range, a token id out of the vocabulary.
            ContextLengthError: prompt (+ max_tokens where given) does not fit; the message has both numbers.
            UnsupportedError: something that this model cannot do, by name.
        """
        ...

    def decoder(self, prepared: PreparedRequest, index: int) -> TextDecoder:
        """Return a fresh decoder for choice `index`."""
        ...

    def tokenize(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Text -> ids. Special tokens written in `text` stay text unless `parse_special`."""
        ...

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids -> text."""
        ...


@runtime_checkable
class EmbeddingClient(Protocol):
    """What an `EngineClient` that can compute vectors offers besides its other methods."""

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Compute one vector for each input; cancelling the task drops what is not computed yet.

        Raises:
            UnsupportedError: the model cannot do this task, pooling or number of dimensions.
            ContextLengthError: an input is longer than the context.
            DeadlineExceededError: the request's own deadline passed.
            EngineDiedError: the engine ended or the connection broke.
        """
        ...


@runtime_checkable
class BlockEventClient(Protocol):
    """What an `EngineClient` that tells what its prefix cache holds offers besides its other methods."""

    async def block_events(self, after: int) -> Sequence[BlockEvent]:
        """Return the changes numbered above `after`; if the first is not ``after + 1``, older ones are gone."""
        ...

    async def block_snapshot(self) -> BlockSnapshot:
        """Return all that the cache holds, and the number of the last change."""
        ...


@runtime_checkable
class KVTransferClient(Protocol):
    """What an `EngineClient` that can hand KV blocks over to another engine of the same machine offers besides its other methods."""

    async def export_kv(self, request: KVExportRequest) -> KVTicket:
        """Lay the cached blocks of a prompt's beginning ready for another engine.

        Raises:
            KVTransferError: nothing of it is cached, or there is no room.
        """
        ...

    async def import_kv(self, ticket: KVTicket) -> KVImported:
        """Take blocks that another engine laid ready; they are gone afterwards, whether it worked or not.

        Raises:
            KVTransferError: they are another model's, incomplete or damaged; a prefill does without them.
        """
        ...

    async def discard_kv(self, name: str) -> bool:
        """Remove blocks of a ticket that nobody will import; False if they are gone."""
        ...


@runtime_checkable
class EmbeddingModel(Protocol):
    """The text side of a model that gives vectors. A `ChatModel` of a decoder offers these methods too."""

    @property
    def model_id(self) -> str:
        """The name it is served under."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of one input."""
        ...

    def prepare_embedding(self, request: EmbeddingRequest) -> EmbedRequest:
        """Tokenise and check.

        Raises:
            InvalidArgumentError: no input, an empty one, a token id out of the vocabulary.
            ContextLengthError: an input does not fit and `truncate` is off; the message has both numbers.
        """
        ...

    def prepare_score(self, request: ScoreRequest) -> EmbedRequest:
        """Pair the query with each document and tokenise; `sagellm_protocol.embedding.relevance` reads the result.

        Raises:
            InvalidArgumentError: the query or a document is empty, or there is none.
            ContextLengthError: a pair does not fit and `truncate` is off.
            UnsupportedError: the model is no scorer.
        """
        ...
