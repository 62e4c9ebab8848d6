"""All routes: method, path, handler, error shape, and the role that a key needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sagellm_gateway import metrics, replies
from sagellm_gateway.context import Handler
from sagellm_gateway.dialects import anthropic as anthropic_types
from sagellm_gateway.dialects import ollama as ollama_types
from sagellm_gateway.dialects import openai_chat, openai_completions, openai_responses
from sagellm_gateway.dialects import vectors as vector_types
from sagellm_gateway.errors import Shape, anthropic_body, bare_body, ollama_body, openai_body
from sagellm_gateway.routes import (
    adapters,
    anthropic,
    docs,
    files,
    management,
    models,
    ollama,
    openai,
    operation,
    responses,
    sessions,
    tokens,
    vectors,
)

__all__ = ["ALIASED", "ROUTES", "RouteSpec"]

Role = Literal["open", "user", "metrics", "admin"]


class RouteSpec(NamedTuple):
    """One row.

    Attributes:
        method: of HTTP.
        path: with ``{name}`` for one segment and ``{name:path}`` for the rest.
        handler: what answers.
        role: that a key needs; ``open`` needs no key.
        shape: of errors.
        body: type of the request's JSON; None if there is none.
        reply: type of the answer's JSON; None is any object.
        status: of success.
        stream: media type of the streamed answer, where there is one.
        media: media type of the answer, where it is not JSON.
        query: parameters and their schemas.
        optional_body: whether the body may be left out.
        form: the properties of a form, where the body is one and no JSON.
    """

    method: str
    path: str
    handler: Handler
    role: Role = "user"
    shape: Shape = openai_body
    body: Any = None
    reply: Any = None
    status: int = 200
    stream: str | None = None
    media: str | None = None
    query: Mapping[str, Any] = {}
    optional_body: bool = False
    form: Mapping[str, Any] = {}


SSE = "text/event-stream"
LINES = "application/x-ndjson"
STRING = {"type": "string"}
INTEGER = {"type": "integer"}
BOOL = {"type": "boolean"}
ORDER = {"enum": ["asc", "desc"]}
PAGE = {"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": STRING}
LONG_PAGE = {"limit": {"type": "integer", "minimum": 1, "maximum": 10_000}, "after": STRING}

# First segments of paths that also answer under the old prefix /api.
ALIASED = ("v1", "health", "ready", "live", "sessions", "management")

ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        "POST",
        "/v1/chat/completions",
        openai.chat_completions,
        body=openai_chat.ChatBody,
        reply=replies.ChatCompletionReply,
        stream=SSE,
    ),
    RouteSpec(
        "POST",
        "/v1/completions",
        openai.completions,
        body=openai_completions.CompletionBody,
        reply=replies.CompletionReply,
        stream=SSE,
    ),
    RouteSpec("GET", "/v1/models", models.list_models, reply=replies.ModelsReply),
    RouteSpec("GET", "/v1/models/{model:path}", models.get_model),
    RouteSpec(
        "POST",
        "/v1/responses",
        responses.create,
        body=openai_responses.ResponsesBody,
        reply=replies.ResponseReply,
        stream=SSE,
    ),
    RouteSpec("POST", "/v1/responses/input_tokens", responses.input_tokens, body=openai_responses.ResponsesBody),
    RouteSpec(
        "GET",
        "/v1/responses/{response}",
        responses.get,
        reply=replies.ResponseReply,
        stream=SSE,
        query={"stream": BOOL, "starting_after": INTEGER},
    ),
    RouteSpec("DELETE", "/v1/responses/{response}", responses.delete),
    RouteSpec("POST", "/v1/responses/{response}/cancel", responses.cancel, reply=replies.ResponseReply),
    RouteSpec("GET", "/v1/responses/{response}/input_items", responses.input_items, query={**PAGE, "order": ORDER}),
    RouteSpec(
        "POST", "/v1/embeddings", vectors.embeddings, body=vector_types.EmbeddingsBody, reply=replies.EmbeddingsReply
    ),
    RouteSpec("POST", "/v1/rerank", vectors.rerank, body=vector_types.RerankBody),
    RouteSpec("POST", "/v1/score", vectors.score, body=vector_types.ScoreBody),
    RouteSpec("POST", "/rerank", vectors.rerank, body=vector_types.RerankBody),
    RouteSpec("POST", "/score", vectors.score, body=vector_types.ScoreBody),
    RouteSpec("POST", "/api/embed", vectors.ollama_embed, "user", ollama_body, body=vector_types.OllamaEmbedBody),
    RouteSpec(
        "POST",
        "/api/embeddings",
        vectors.ollama_embeddings,
        "user",
        ollama_body,
        body=vector_types.OllamaEmbeddingsBody,
    ),
    RouteSpec("POST", "/v1/files", files.upload, form=files.FORM),
    RouteSpec("GET", "/v1/files", files.list_files, query={**LONG_PAGE, "purpose": STRING}),
    RouteSpec("GET", "/v1/files/{file}", files.get_file),
    RouteSpec("DELETE", "/v1/files/{file}", files.delete_file),
    RouteSpec("GET", "/v1/files/{file}/content", files.read_file, media="application/octet-stream"),
    RouteSpec("POST", "/v1/batches", files.create_batch, body=files.BatchBody),
    RouteSpec("GET", "/v1/batches", files.list_batches, query=LONG_PAGE),
    RouteSpec("GET", "/v1/batches/{batch}", files.get_batch),
    RouteSpec("POST", "/v1/batches/{batch}/cancel", files.cancel_batch),
    RouteSpec(
        "POST",
        "/v1/messages",
        anthropic.messages,
        "user",
        anthropic_body,
        body=anthropic_types.MessagesBody,
        reply=replies.MessageReply,
        stream=SSE,
    ),
    RouteSpec(
        "POST",
        "/v1/messages/count_tokens",
        anthropic.count_tokens,
        "user",
        anthropic_body,
        body=anthropic_types.CountBody,
    ),
    RouteSpec("POST", "/api/chat", ollama.chat, "user", ollama_body, body=ollama_types.OllamaChatBody, stream=LINES),
    RouteSpec(
        "POST",
        "/api/generate",
        ollama.generate_,
        "user",
        ollama_body,
        body=ollama_types.OllamaGenerateBody,
        stream=LINES,
    ),
    RouteSpec("GET", "/api/tags", ollama.tags, "user", ollama_body),
    RouteSpec("GET", "/api/ps", ollama.ps, "user", ollama_body),
    RouteSpec("GET", "/api/version", ollama.version, "user", ollama_body),
    RouteSpec("POST", "/api/show", ollama.show, "user", ollama_body, body=ollama.NameBody),
    RouteSpec("POST", "/api/pull", ollama.pull, "admin", ollama_body, body=ollama.NameBody, stream=LINES),
    RouteSpec("POST", "/api/copy", ollama.copy, "admin", ollama_body, body=ollama.CopyBody),
    RouteSpec("DELETE", "/api/delete", ollama.delete, "admin", ollama_body, body=ollama.NameBody),
    RouteSpec("POST", "/tokenize", tokens.tokenize, body=tokens.TokenizeBody),
    RouteSpec("POST", "/detokenize", tokens.detokenize, body=tokens.DetokenizeBody),
    RouteSpec("GET", "/tokenizer_info", tokens.tokenizer_info, query={"model": STRING}),
    RouteSpec("POST", "/v1/load_lora_adapter", adapters.load_adapter, "admin", body=adapters.LoadAdapterBody),
    RouteSpec("POST", "/v1/unload_lora_adapter", adapters.unload_adapter, "admin", body=adapters.UnloadAdapterBody),
    RouteSpec("GET", "/v1/management/engines", management.engines, "admin", query={"state": STRING}),
    RouteSpec(
        "POST", "/v1/management/engines", management.start_engine, "admin", body=management.StartBody, status=201
    ),
    RouteSpec(
        "POST",
        "/v1/management/engines/register",
        management.register,
        "admin",
        body=management.RegisterBody,
        status=201,
    ),
    RouteSpec("POST", "/v1/management/engines/prune", management.prune, "admin"),
    RouteSpec("GET", "/v1/management/engines/{engine}", management.engine, "admin"),
    RouteSpec("DELETE", "/v1/management/engines/{engine}", management.stop_engine, "admin"),
    RouteSpec("POST", "/v1/management/engines/{engine}/drain", management.drain_engine, "admin"),
    RouteSpec("POST", "/v1/management/engines/{engine}/heartbeat", management.heartbeat, "admin"),
    RouteSpec("GET", "/v1/management/engines/{engine}/logs", management.engine_logs, "admin", query={"lines": INTEGER}),
    RouteSpec("GET", "/v1/management/status", management.status, "admin"),
    RouteSpec("GET", "/v1/management/backends", management.backends, "admin"),
    RouteSpec("GET", "/v1/management/gpu", management.devices, "admin"),
    RouteSpec("GET", "/v1/management/policy", management.get_policy, "admin"),
    RouteSpec("PUT", "/v1/management/policy", management.set_policy, "admin", body=management.PolicyBody),
    RouteSpec("POST", "/v1/management/policy", management.set_policy, "admin", body=management.PolicyBody),
    RouteSpec("POST", "/v1/management/models/load", management.load_model, "admin", body=management.ModelBody),
    RouteSpec("POST", "/v1/management/models/unload", management.unload_model, "admin", body=management.ModelBody),
    RouteSpec("GET", "/v1/management/keys", management.keys, "admin"),
    RouteSpec("POST", "/v1/management/keys", management.add_key, "admin", body=management.KeyBody, status=201),
    RouteSpec("DELETE", "/v1/management/keys/{key}", management.revoke_key, "admin"),
    RouteSpec("GET", "/v1/management/usage", management.usage, "admin", query={"key": STRING}),
    RouteSpec("POST", "/sessions", sessions.create, body=sessions.CreateBody, optional_body=True, status=201),
    RouteSpec("GET", "/sessions", sessions.list_all),
    RouteSpec("POST", "/sessions/cleanup", sessions.cleanup, body=sessions.CleanupBody, optional_body=True),
    RouteSpec("GET", "/sessions/{session}", sessions.get),
    RouteSpec("DELETE", "/sessions/{session}", sessions.delete),
    RouteSpec("POST", "/sessions/{session}/clear", sessions.clear),
    RouteSpec("PATCH", "/sessions/{session}/title", sessions.rename, body=sessions.RenameBody),
    RouteSpec("GET", "/metrics", metrics.metrics, "metrics", bare_body, media="text/plain"),
    RouteSpec("GET", "/live", operation.live, "open", bare_body),
    RouteSpec("GET", "/health", operation.health, "open", bare_body),
    RouteSpec("GET", "/ready", operation.ready, "open", bare_body),
    RouteSpec("GET", "/version", operation.version, "user", bare_body),
    RouteSpec("GET", "/openapi.json", docs.openapi),
    RouteSpec("GET", "/docs", docs.docs, media="text/html"),
    RouteSpec("GET", "/docs.js", docs.docs_script, media="text/javascript"),
    RouteSpec("GET", "/", docs.page, media="text/html"),
    RouteSpec("GET", "/chat.js", docs.page_script, media="text/javascript"),
)
