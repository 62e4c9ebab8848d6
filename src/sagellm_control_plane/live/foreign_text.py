"""The text side of an engine that takes and gives text itself: nothing is templated, tokenised or parsed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from sagellm_protocol.embedding import EmbeddingRequest, EmbedRequest, ScoreRequest
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import ChoiceDelta, GenerationRequest
from sagellm_protocol.ports import PreparedRequest
from sagellm_protocol.prefix import BYTES_PER_TOKEN

__all__ = ["ForeignChatModel"]


@dataclass(frozen=True)
class _Prepared:
    source: GenerationRequest
    engine_requests: Sequence[EngineRequest]
    text: bytes | None


class _PassThrough:
    """Deltas as the engine gave them."""

    def __init__(self, index: int) -> None:
        self._index = index

    def push(self, delta: TokenDelta) -> ChoiceDelta | None:
        if not (delta.text or delta.reasoning or delta.tool_calls or delta.finish_reason):
            return None
        return ChoiceDelta(
            index=self._index,
            text=delta.text or "",
            reasoning=delta.reasoning or "",
            tool_calls=delta.tool_calls,
            finish_reason=delta.finish_reason,
        )


class ForeignChatModel:
    """A `ChatModel` without a tokenizer; also prepares embeddings."""

    tokenizes = False

    def __init__(self, model_id: str, context_length: int = 0) -> None:
        self.model_id = model_id
        self.context_length = context_length

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """The engine has its own."""
        return {}

    def prepare(self, request: GenerationRequest) -> _Prepared:
        """Check what can be checked without the model.

        Raises:
            InvalidArgumentError: no message and no prompt.
        """
        if not (request.messages or request.prompt or request.suffix):
            raise InvalidArgumentError("messages is empty: give at least one message", param="messages")
        text: bytes | None = None
        if request.messages is None and isinstance(request.prompt, tuple):
            ids = request.prompt
        else:
            text = _text(request)
            ids = (0,) * (len(text) // BYTES_PER_TOKEN)  # their count tells the load; they are never sent
        return _Prepared(request, tuple([self._choice(request, ids or (0,), k) for k in range(request.n)]), text)

    def _choice(self, request: GenerationRequest, ids: tuple[int, ...], k: int) -> EngineRequest:
        sampling = request.sampling
        if k and sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + k)
        return EngineRequest(
            request_id=request.request_id if request.n == 1 else f"{request.request_id}/{k}",
            trace_id=request.trace_id,
            prompt_token_ids=ids,
            sampling=sampling,
            priority=request.priority,
            deadline_s=request.deadline_s,
            adapter=request.adapter,
            source=request,
        )

    def decoder(self, prepared: PreparedRequest, index: int) -> _PassThrough:
        """Return a decoder that shows what the engine said."""
        del prepared
        return _PassThrough(index)

    def prepare_embedding(self, request: EmbeddingRequest) -> EmbedRequest:
        """Pass texts on.

        Raises:
            InvalidArgumentError: no input, or an empty one.
            UnsupportedError: token ids.
        """
        texts = []
        for text in request.inputs:
            if not isinstance(text, str):
                raise UnsupportedError("an engine over HTTP embeds texts, not token ids", param="input")
            texts.append(text)
        if not texts or not all(texts):
            raise InvalidArgumentError("the input is empty: give at least one character for each input", param="input")
        if request.truncate:
            raise UnsupportedError("truncate is not supported by an engine over HTTP", param="truncate")
        return EmbedRequest(
            request_id=request.request_id,
            trace_id=request.trace_id,
            inputs=tuple((0,) * max(1, len(text) // BYTES_PER_TOKEN) for text in texts),
            texts=tuple(texts),
            pooling=request.pooling,
            dimensions=request.dimensions,
            normalize=request.normalize,
            priority=request.priority,
            deadline_s=request.deadline_s,
            adapter=request.adapter,
        )

    def prepare_score(self, request: ScoreRequest) -> EmbedRequest:
        """Refuse: there is no common call for it."""
        raise UnsupportedError(f"model {request.model!r} runs on an engine over HTTP: it cannot score", param="model")

    def tokenize(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Refuse: the tokenizer is the engine's."""
        del text, add_special_tokens, parse_special
        raise UnsupportedError(f"model {self.model_id!r} runs on an engine over HTTP: its tokenizer is not here")

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Refuse: the tokenizer is the engine's."""
        del token_ids, skip_special_tokens
        raise UnsupportedError(f"model {self.model_id!r} runs on an engine over HTTP: its tokenizer is not here")


def _text(request: GenerationRequest) -> bytes:
    """Return the prompt in one piece: equal beginnings of requests are equal beginnings of it."""
    if request.messages is not None:
        text = "\x1e".join([f"{message.role}\x1f{message.content or ''}" for message in request.messages])
    else:
        text = str(request.prompt or "")
    return text.encode("utf-8", "surrogatepass")
