"""All routes: method, path, handler, error shape, and the role that a key needs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sagellm_gateway import metrics
from sagellm_gateway.context import Handler
from sagellm_gateway.errors import Shape, anthropic_body, bare_body, ollama_body, openai_body
from sagellm_gateway.routes import (
    anthropic,
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
    """One row. `role` ``open`` needs no key."""

    method: str
    path: str
    handler: Handler
    role: Role = "user"
    shape: Shape = openai_body


# First segments of paths that also answer under the old prefix /api.
ALIASED = ("v1", "health", "ready", "live", "sessions", "management")

ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("POST", "/v1/chat/completions", openai.chat_completions),
    RouteSpec("POST", "/v1/completions", openai.completions),
    RouteSpec("GET", "/v1/models", models.list_models),
    RouteSpec("GET", "/v1/models/{model:path}", models.get_model),
    RouteSpec("POST", "/v1/responses", responses.create),
    RouteSpec("POST", "/v1/responses/input_tokens", responses.input_tokens),
    RouteSpec("GET", "/v1/responses/{response}", responses.get),
    RouteSpec("DELETE", "/v1/responses/{response}", responses.delete),
    RouteSpec("POST", "/v1/responses/{response}/cancel", responses.cancel),
    RouteSpec("GET", "/v1/responses/{response}/input_items", responses.input_items),
    RouteSpec("POST", "/v1/embeddings", vectors.embeddings),
    RouteSpec("POST", "/v1/rerank", vectors.rerank),
    RouteSpec("POST", "/v1/score", vectors.score),
    RouteSpec("POST", "/rerank", vectors.rerank),
    RouteSpec("POST", "/score", vectors.score),
    RouteSpec("POST", "/api/embed", vectors.ollama_embed, "user", ollama_body),
    RouteSpec("POST", "/api/embeddings", vectors.ollama_embeddings, "user", ollama_body),
    RouteSpec("POST", "/v1/messages", anthropic.messages, "user", anthropic_body),
    RouteSpec("POST", "/v1/messages/count_tokens", anthropic.count_tokens, "user", anthropic_body),
    RouteSpec("POST", "/api/chat", ollama.chat, "user", ollama_body),
    RouteSpec("POST", "/api/generate", ollama.generate_, "user", ollama_body),
    RouteSpec("GET", "/api/tags", ollama.tags, "user", ollama_body),
    RouteSpec("GET", "/api/ps", ollama.ps, "user", ollama_body),
    RouteSpec("GET", "/api/version", ollama.version, "user", ollama_body),
    RouteSpec("POST", "/api/show", ollama.show, "user", ollama_body),
    RouteSpec("POST", "/api/pull", ollama.pull, "admin", ollama_body),
    RouteSpec("POST", "/api/copy", ollama.copy, "admin", ollama_body),
    RouteSpec("DELETE", "/api/delete", ollama.delete, "admin", ollama_body),
    RouteSpec("POST", "/tokenize", tokens.tokenize),
    RouteSpec("POST", "/detokenize", tokens.detokenize),
    RouteSpec("GET", "/tokenizer_info", tokens.tokenizer_info),
    RouteSpec("GET", "/v1/management/engines", management.engines, "admin"),
    RouteSpec("POST", "/v1/management/engines", management.start_engine, "admin"),
    RouteSpec("POST", "/v1/management/engines/register", management.register, "admin"),
    RouteSpec("POST", "/v1/management/engines/prune", management.prune, "admin"),
    RouteSpec("GET", "/v1/management/engines/{engine}", management.engine, "admin"),
    RouteSpec("DELETE", "/v1/management/engines/{engine}", management.stop_engine, "admin"),
    RouteSpec("POST", "/v1/management/engines/{engine}/drain", management.drain_engine, "admin"),
    RouteSpec("GET", "/v1/management/engines/{engine}/logs", management.engine_logs, "admin"),
    RouteSpec("GET", "/v1/management/status", management.status, "admin"),
    RouteSpec("GET", "/v1/management/backends", management.backends, "admin"),
    RouteSpec("GET", "/v1/management/gpu", management.devices, "admin"),
    RouteSpec("GET", "/v1/management/policy", management.get_policy, "admin"),
    RouteSpec("PUT", "/v1/management/policy", management.set_policy, "admin"),
    RouteSpec("POST", "/v1/management/policy", management.set_policy, "admin"),
    RouteSpec("POST", "/v1/management/models/load", management.load_model, "admin"),
    RouteSpec("POST", "/v1/management/models/unload", management.unload_model, "admin"),
    RouteSpec("GET", "/v1/management/keys", management.keys, "admin"),
    RouteSpec("POST", "/v1/management/keys", management.add_key, "admin"),
    RouteSpec("DELETE", "/v1/management/keys/{key}", management.revoke_key, "admin"),
    RouteSpec("GET", "/v1/management/usage", management.usage, "admin"),
    RouteSpec("POST", "/sessions", sessions.create),
    RouteSpec("GET", "/sessions", sessions.list_all),
    RouteSpec("POST", "/sessions/cleanup", sessions.cleanup),
    RouteSpec("GET", "/sessions/{session}", sessions.get),
    RouteSpec("DELETE", "/sessions/{session}", sessions.delete),
    RouteSpec("POST", "/sessions/{session}/clear", sessions.clear),
    RouteSpec("PATCH", "/sessions/{session}/title", sessions.rename),
    RouteSpec("GET", "/metrics", metrics.metrics, "metrics", bare_body),
    RouteSpec("GET", "/live", operation.live, "open", bare_body),
    RouteSpec("GET", "/health", operation.health, "open", bare_body),
    RouteSpec("GET", "/ready", operation.ready, "open", bare_body),
    RouteSpec("GET", "/version", operation.version, "user", bare_body),
)
