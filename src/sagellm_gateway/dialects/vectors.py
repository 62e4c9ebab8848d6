"""Embeddings (OpenAI, Ollama), rerank and score: wire types and translation."""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec

from sagellm_gateway.dialects.openai_common import check_model
from sagellm_protocol.embedding import EmbeddingRequest, EmbedResult, ScoreRequest
from sagellm_protocol.errors import InvalidArgumentError

__all__ = [
    "KNOWN_EMBEDDINGS",
    "KNOWN_RERANK",
    "KNOWN_SCORE",
    "EmbeddingsBody",
    "OllamaEmbedBody",
    "OllamaEmbeddingsBody",
    "RerankBody",
    "ScoreBody",
    "embeddings_json",
    "embeddings_request",
    "rerank_json",
    "rerank_request",
    "score_requests",
]

_MAX_INPUTS = 2048


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """The request body of /v1/embeddings."""

    model: str
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    truncate_prompt_tokens: int | None = None


class OllamaEmbedBody(msgspec.Struct, kw_only=True):
    """The request body of /api/embed."""

    model: str
    input: str | list[str]
    truncate: bool = True
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class OllamaEmbeddingsBody(msgspec.Struct, kw_only=True):
    """The request body of the older /api/embeddings."""

    model: str
    prompt: str
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class RerankDocument(msgspec.Struct, kw_only=True):
    """A document as an object."""

    text: str


class RerankBody(msgspec.Struct, kw_only=True):
    """The request body of /v1/rerank."""

    model: str
    query: str
    documents: list[str | RerankDocument]
    top_n: int | None = None
    return_documents: bool = True
    instruction: str | None = None
    truncate: bool = False


class ScoreBody(msgspec.Struct, kw_only=True):
    """The request body of /v1/score."""

    model: str
    text_1: str | list[str]
    text_2: str | list[str]
    instruction: str | None = None


KNOWN_EMBEDDINGS = frozenset(EmbeddingsBody.__struct_fields__)
KNOWN_RERANK = frozenset(RerankBody.__struct_fields__)
KNOWN_SCORE = frozenset(ScoreBody.__struct_fields__)


def inputs_of(value: str | list[Any], param: str = "input") -> tuple[str | tuple[int, ...], ...]:
    """Return the texts and token sequences of an input of any of the four shapes.

    Raises:
        InvalidArgumentError: empty, too many, or of another shape.
    """
    if isinstance(value, str) or (value and all(type(v) is int for v in value)):
        value = [value]
    if not value:
        raise InvalidArgumentError(f"{param} is empty: send at least one text", param=param)
    if len(value) > _MAX_INPUTS:
        raise InvalidArgumentError(f"{param} has {len(value)} entries, the most is {_MAX_INPUTS}", param=param)
    return tuple(_one(v, f"{param}[{i}]", param) for i, v in enumerate(value))


def _one(value: Any, where: str, param: str) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if not value:
            raise InvalidArgumentError(f"{where} is an empty string", param=param)
        return value
    if isinstance(value, list) and value and all(type(v) is int and 0 <= v < 2**31 for v in value):
        return tuple(value)
    raise InvalidArgumentError(f"{where} must be a string or a list of token ids", param=param)


def embeddings_request(body: EmbeddingsBody, request_id: str, **extra: Any) -> EmbeddingRequest:
    """Translate a request for embeddings.

    Raises:
        InvalidArgumentError: something is missing or out of range.
    """
    if body.dimensions is not None and not 1 <= body.dimensions <= 65536:
        raise InvalidArgumentError(f"dimensions is {body.dimensions}: it must be 1 to 65536", param="dimensions")
    if body.truncate_prompt_tokens not in (None, -1):
        raise InvalidArgumentError(
            "truncate_prompt_tokens must be -1 (cut to the model's context) or left out", param="truncate_prompt_tokens"
        )
    return EmbeddingRequest(
        request_id=request_id,
        model=check_model(body.model),
        inputs=inputs_of(body.input),
        dimensions=body.dimensions,
        truncate=body.truncate_prompt_tokens == -1,
        **extra,
    )


def _rows(result: EmbedResult) -> list[bytes]:
    step = 4 * result.width
    return [result.data[at : at + step] for at in range(0, len(result.data), step)]


def embeddings_json(body: EmbeddingsBody, result: EmbedResult) -> dict[str, Any]:
    """Return the answer; base64 is that of little-endian float32, as the official clients ask for it."""
    vectors: list[Any]
    if body.encoding_format == "base64":
        vectors = [base64.b64encode(row).decode() for row in _rows(result)]
    else:
        vectors = list(result.vectors())
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)],
        "model": body.model,
        "usage": {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens},
    }


def documents_of(body: RerankBody) -> list[str]:
    """Return the documents as texts."""
    return [d if isinstance(d, str) else d.text for d in body.documents]


def _pairs(query: str, documents: list[str], names: tuple[str, str]) -> None:
    if not query:
        raise InvalidArgumentError(f"{names[0]} is empty", param=names[0])
    if not documents or not all(documents):
        raise InvalidArgumentError(f"{names[1]} is empty or has an empty text", param=names[1])
    if len(documents) > _MAX_INPUTS:
        raise InvalidArgumentError(
            f"{names[1]} has {len(documents)} entries, the most is {_MAX_INPUTS}", param=names[1]
        )


def rerank_request(body: RerankBody, request_id: str, **extra: Any) -> ScoreRequest:
    """Translate a rerank request.

    Raises:
        InvalidArgumentError: something is missing or out of range.
    """
    documents = documents_of(body)
    _pairs(body.query, documents, ("query", "documents"))
    if body.top_n is not None and body.top_n < 1:
        raise InvalidArgumentError(f"top_n is {body.top_n}: it must be at least 1", param="top_n")
    return ScoreRequest(
        request_id=request_id,
        model=check_model(body.model),
        query=body.query,
        documents=tuple(documents),
        instruction=body.instruction or "",
        truncate=body.truncate,
        **extra,
    )


def rerank_json(body: RerankBody, request_id: str, scores: list[float], tokens: int) -> dict[str, Any]:
    """Return the answer, best document first."""
    documents = documents_of(body)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: body.top_n]
    results = []
    for i in order:
        row: dict[str, Any] = {"index": i, "relevance_score": scores[i]}
        if body.return_documents:
            row["document"] = {"text": documents[i]}
        results.append(row)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": request_id, "model": body.model, "results": results, "usage": usage}


def score_requests(body: ScoreBody, request_id: str, **extra: Any) -> list[ScoreRequest]:
    """Translate a score request: one text against many, or two lists of one length pair by pair.

    Raises:
        InvalidArgumentError: something is missing, or the lists differ in length.
    """
    left, right = body.text_1, body.text_2
    rights = [right] if isinstance(right, str) else right
    if isinstance(left, list) and len(left) == 1:
        left = left[0]
    if isinstance(left, str):
        groups = [(left, rights)]
    elif len(left) == len(rights):
        groups = [(a, [b]) for a, b in zip(left, rights, strict=True)]
    else:
        raise InvalidArgumentError(
            f"text_1 has {len(left)} texts and text_2 {len(rights)}: send one against many, or as many", param="text_1"
        )
    if not groups:
        raise InvalidArgumentError("text_1 is empty", param="text_1")
    for query, documents in groups:
        _pairs(query, documents, ("text_1", "text_2"))
    return [
        ScoreRequest(
            request_id=f"{request_id}-{k}",
            model=check_model(body.model),
            query=query,
            documents=tuple(documents),
            instruction=body.instruction or "",
            **extra,
        )
        for k, (query, documents) in enumerate(groups)
    ]
