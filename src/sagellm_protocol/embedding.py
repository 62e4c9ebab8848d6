"""Vectors instead of tokens: embeddings and relevance scores, from the request in words to the engine's numbers."""

from __future__ import annotations

import math
import sys
from array import array
from typing import Literal

import msgspec

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.generation import Priority

__all__ = ["EmbedRequest", "EmbedResult", "EmbeddingRequest", "Pooling", "ScoreRequest", "relevance"]

Pooling = Literal["model", "mean", "cls", "last"]
"""How a sequence's hidden states become one vector; ``model`` is what the model was trained with."""


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Embed texts, whatever dialect asked for it.

    Attributes:
        request_id: unique.
        model: as the client named it.
        inputs: texts, or token ids that are taken as they are.
        dimensions: of the result; None is the model's own. Fewer cuts the vector before it is normalised
            (Kusupati et al., 2022).
        normalize: scale to length 1; None is what the model was trained with.
        pooling: as in `Pooling`.
        truncate: cut an input that is longer than the context instead of refusing it.
    """

    request_id: str
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    normalize: bool | None = None
    pooling: Pooling = "model"
    truncate: bool = False
    trace_id: str = ""
    priority: int = Priority.NORMAL
    deadline_s: float | None = None
    adapter: str | None = None


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Score how well each document answers the query: by a cross-encoder, or by a chat model's yes against its no.

    Attributes:
        request_id: unique.
        model: as the client named it.
        query: one text.
        documents: the texts to score.
        instruction: what relevant means, for models that take words for it; "" is the usual web search.
        truncate: cut a document that is too long instead of refusing it.
    """

    request_id: str
    model: str
    query: str
    documents: tuple[str, ...]
    instruction: str = ""
    truncate: bool = False
    trace_id: str = ""
    priority: int = Priority.NORMAL
    deadline_s: float | None = None
    adapter: str | None = None


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sequences of which an engine computes one vector each.

    Attributes:
        request_id: unique on the engine at any time.
        inputs: token ids, special ones included; at least one sequence, none empty.
        token_types: segment of each token (BERT's pairs), or empty for all zero.
        task: ``embed`` pools hidden states; ``classify`` gives the classifier's logits; ``logprobs`` gives the
            log-probabilities of `target_ids` as next tokens.
        pooling, dimensions, normalize: of ``embed``; see `EmbeddingRequest`.
        target_ids: of ``logprobs``.
        texts: the inputs as text, for engines that take text instead of token ids (foreign ones).
    """

    request_id: str
    inputs: tuple[tuple[int, ...], ...]
    token_types: tuple[tuple[int, ...], ...] = ()
    task: Literal["embed", "classify", "logprobs"] = "embed"
    pooling: Pooling = "model"
    dimensions: int | None = None
    normalize: bool | None = None
    target_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    trace_id: str = ""
    priority: int = Priority.NORMAL
    deadline_s: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not self.inputs or not all(self.inputs):
            raise InvalidArgumentError("the input is empty: give at least one token for each input", param="input")
        if self.token_types and [len(t) for t in self.token_types] != [len(i) for i in self.inputs]:
            raise InvalidArgumentError("token_types and inputs have different lengths", param="token_types")
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidArgumentError(f"dimensions is {self.dimensions}: it must be positive", param="dimensions")
        if (self.task == "logprobs") != bool(self.target_ids):
            raise InvalidArgumentError("target_ids belong to the task logprobs, which needs them", param="target_ids")


class EmbedResult(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, in order.

    Attributes:
        request_id: of the request.
        width: numbers in a vector.
        data: float32, little-endian, inputs × width; as bytes, because a list of floats is ten times as slow.
        prompt_tokens: tokens of all inputs.
    """

    request_id: str
    width: int
    data: bytes
    prompt_tokens: int

    def vectors(self) -> list[list[float]]:
        """Return the vectors as lists."""
        flat = array("f", self.data)
        if sys.byteorder == "big":
            flat.byteswap()
        return [flat[at : at + self.width].tolist() for at in range(0, len(flat), self.width)]


def relevance(result: EmbedResult) -> list[float]:
    """Return a score in [0, 1] for each sequence of a scoring request.

    One number is a cross-encoder's logit (its sigmoid is taken); two are the log-probabilities of yes and of no.

    Raises:
        InvalidArgumentError: the model gives some other number of values, so it is no scorer.
    """
    if result.width not in (1, 2):
        raise InvalidArgumentError(f"the model gives {result.width} values a text: it cannot score", param="model")
    logits = [row[0] - row[1] if len(row) == 2 else row[0] for row in result.vectors()]
    return [1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in logits]
