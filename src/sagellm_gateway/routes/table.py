"""All routes: method, path, handler, error shape, and the role that a key needs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sagellm_gateway.context import Handler
from sagellm_gateway.errors import Shape, bare_body, openai_body
from sagellm_gateway.routes import models, openai, operation

__all__ = ["ROUTES", "RouteSpec"]

Role = Literal["open", "user", "metrics", "admin"]


class RouteSpec(NamedTuple):
    """One row. `role` ``open`` needs no key."""

    method: str
    path: str
    handler: Handler
    role: Role = "user"
    shape: Shape = openai_body


# The most used first: routes are tried in order.
ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("POST", "/v1/chat/completions", openai.chat_completions),
    RouteSpec("POST", "/v1/completions", openai.completions),
    RouteSpec("GET", "/v1/models", models.list_models),
    RouteSpec("GET", "/v1/models/{model:path}", models.get_model),
    RouteSpec("GET", "/live", operation.live, "open", bare_body),
    RouteSpec("GET", "/health", operation.health, "open", bare_body),
    RouteSpec("GET", "/ready", operation.ready, "open", bare_body),
    RouteSpec("GET", "/version", operation.version, "user", bare_body),
)
