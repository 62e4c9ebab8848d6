"""/v1/embeddings, /v1/rerank, /v1/score, /api/embed, /api/embeddings."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sagellm_gateway.context import Call
from sagellm_gateway.dialects import vectors
from sagellm_gateway.dialects.openai_common import ignored_fields
from sagellm_gateway.guard import Guard
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.routes.generation import extras, now
from sagellm_protocol.embedding import EmbeddingRequest, EmbedResult, ScoreRequest, relevance

__all__ = ["embeddings", "ollama_embed", "ollama_embeddings", "rerank", "score"]


def _extras(call: Call) -> dict[str, Any]:
    found = extras(call)
    found.pop("tenant", None)
    if "sagellm.priority" in call.scope:
        found["priority"] = call.scope["sagellm.priority"]
    return found


async def _embed(call: Call, request: EmbeddingRequest) -> EmbedResult:
    call.scope["sagellm.model"] = request.model
    call.gateway.admit()
    async with Guard(call.scope, call.receive, call.gateway.in_flight):
        result: EmbedResult = await call.gateway.manager.embed(request)
    call.used(result.prompt_tokens, 0)
    return result


async def _scores(call: Call, requests: list[ScoreRequest]) -> tuple[list[float], int]:
    call.scope["sagellm.model"] = requests[0].model
    call.gateway.admit()
    async with Guard(call.scope, call.receive, call.gateway.in_flight):
        results = await asyncio.gather(*(call.gateway.manager.score(r) for r in requests))
    tokens = sum(r.prompt_tokens for r in results)
    call.used(tokens, 0)
    return [s for r in results for s in relevance(r)], tokens


async def embeddings(call: Call) -> None:
    """POST /v1/embeddings."""
    raw = await call.json_object()
    body = convert(raw, vectors.EmbeddingsBody)
    call.ignore(ignored_fields(raw, vectors.KNOWN_EMBEDDINGS))
    result = await _embed(call, vectors.embeddings_request(body, new_id("embd-"), **_extras(call)))
    await call.json(vectors.embeddings_json(body, result))


async def rerank(call: Call) -> None:
    """POST /v1/rerank."""
    raw = await call.json_object()
    body = convert(raw, vectors.RerankBody)
    call.ignore(ignored_fields(raw, vectors.KNOWN_RERANK))
    request = vectors.rerank_request(body, new_id("rerank-"), **_extras(call))
    scores, tokens = await _scores(call, [request])
    await call.json(vectors.rerank_json(body, request.request_id, scores, tokens))


async def score(call: Call) -> None:
    """POST /v1/score."""
    raw = await call.json_object()
    body = convert(raw, vectors.ScoreBody)
    call.ignore(ignored_fields(raw, vectors.KNOWN_SCORE))
    request_id = new_id("score-")
    scores, tokens = await _scores(call, vectors.score_requests(body, request_id, **_extras(call)))
    await call.json(
        {
            "id": request_id,
            "object": "list",
            "created": now(),
            "model": body.model,
            "data": [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _ollama(call: Call, model: str, inputs: Any, **more: Any) -> EmbedResult:
    from sagellm_gateway.routes.ollama import served

    request = EmbeddingRequest(
        request_id=new_id("embd-"), model=await served(call, model), inputs=inputs, **more, **_extras(call)
    )
    return await _embed(call, request)


async def ollama_embed(call: Call) -> None:
    """POST /api/embed."""
    began = time.monotonic()
    raw = await call.json_object()
    body = convert(raw, vectors.OllamaEmbedBody)
    call.ignore([name for name in ("options", "keep_alive") if raw.get(name)])
    inputs = vectors.inputs_of(body.input)
    result = await _ollama(call, body.model, inputs, truncate=body.truncate, dimensions=body.dimensions)
    await call.json(
        {
            "model": body.model,
            "embeddings": result.vectors(),
            "total_duration": int((time.monotonic() - began) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": result.prompt_tokens,
        }
    )


async def ollama_embeddings(call: Call) -> None:
    """POST /api/embeddings: one prompt, one vector."""
    raw = await call.json_object()
    body = convert(raw, vectors.OllamaEmbeddingsBody)
    call.ignore([name for name in ("options", "keep_alive") if raw.get(name)])
    result = await _ollama(call, body.model, vectors.inputs_of(body.prompt, "prompt"), truncate=True)
    await call.json({"embedding": result.vectors()[0]})
