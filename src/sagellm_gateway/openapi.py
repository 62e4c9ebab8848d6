"""The OpenAPI 3.1 document, made from the route table and the types that decode requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from sagellm_gateway import replies
from sagellm_gateway.errors import anthropic_body, bare_body, ollama_body, openai_body

if TYPE_CHECKING:
    from sagellm_gateway.routes.table import RouteSpec

__all__ = ["document"]

_ERROR_TYPES: dict[Any, Any] = {
    openai_body: replies.OpenAIErrorReply,
    anthropic_body: replies.AnthropicErrorReply,
    ollama_body: replies.OllamaErrorReply,
    bare_body: replies.BareErrorReply,
}
_ERRORS = {
    400: "The request is malformed or a field is wrong; `param` names it",
    401: "No API key, or one that is not known",
    403: "The key's role, the Host or the web origin does not cover this",
    404: "The model, or the thing that the path names, does not exist",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not JSON, or it is compressed",
    429: "Over a rate or a budget; Retry-After says when to come back",
    431: "The headers are too large",
    500: "A fault of the server",
    503: "No engine can take the request now, or the server is shutting down",
    504: "The request's own deadline passed",
}
_REF = "#/components/schemas/{name}"


def document(routes: Iterable[RouteSpec], version: str, *, secured: bool) -> dict[str, Any]:
    """Return the document.

    Args:
        routes: the table.
        version: of the server.
        secured: whether a key is demanded.
    """
    specs = list(routes)
    types: list[Any] = list(dict.fromkeys([t for s in specs for t in (s.body, s.reply) if t is not None]))
    types += [t for t in _ERROR_TYPES.values() if t not in types]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for spec in specs:
        path = re.sub(r"\{(\w+)(:path)?\}", r"{\1}", spec.path)
        paths.setdefault(path, {})[spec.method.lower()] = _operation(spec, schema_of, secured)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "isagellm",
            "version": version,
            "description": "The OpenAI, Anthropic and Ollama APIs, and the server's own routes.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    if secured:
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return found


def _operation(spec: RouteSpec, schema_of: dict[Any, Any], secured: bool) -> dict[str, Any]:
    summary = (spec.handler.__doc__ or "").strip().split("\n")[0]
    summary = re.sub(r"^[A-Z]+ (\S+?)(: |\.$|\.|$)", "", summary) or summary
    name = re.sub(r"\W+", "_", f"{spec.method.lower()}_{spec.path}").strip("_")
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary[:1].upper() + summary[1:],
        "tags": [_tag(spec.path)],
        "parameters": _parameters(spec),
        "responses": _responses(spec, schema_of),
    }
    if spec.body is not None:
        content = {"application/json": {"schema": schema_of[spec.body]}}
        operation["requestBody"] = {"required": not spec.optional_body, "content": content}
    elif spec.form:
        form = {"type": "object", "properties": dict(spec.form), "required": list(spec.form)}
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    if secured and spec.role != "open":
        operation["security"] = [{"bearer": []}, {"key": []}]
    return operation


def _tag(path: str) -> str:
    if path.startswith("/v1/management"):
        return "management"
    for prefix, tag in (
        ("/api/", "ollama"),
        ("/v1/messages", "anthropic"),
        ("/sessions", "sessions"),
        ("/v1/", "openai"),
    ):
        if path.startswith(prefix):
            return tag
    return "operation"


def _parameters(spec: RouteSpec) -> list[dict[str, Any]]:
    names = re.findall(r"\{(\w+)(?::path)?\}", spec.path)
    found: list[dict[str, Any]] = [
        {"name": n, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for n in names
    ]
    found += [{"name": n, "in": "query", "required": False, "schema": s} for n, s in spec.query.items()]
    return found


def _responses(spec: RouteSpec, schema_of: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if spec.media is not None:
        content[spec.media] = {"schema": {"type": "string"}}
    else:
        content["application/json"] = {
            "schema": schema_of[spec.reply] if spec.reply is not None else {"type": "object"}
        }
    if spec.stream is not None:
        content[spec.stream] = {"schema": {"type": "string"}}
    found: dict[str, Any] = {str(spec.status): {"description": "Success", "content": content}}
    error = {"application/json": {"schema": schema_of[_ERROR_TYPES[spec.shape]]}}
    refused = {"application/json": {"schema": {"type": "object"}}}
    for status, text in _ERRORS.items():
        if status in (413, 415, 408) and spec.body is None and not spec.form:
            continue
        # Layers before the route (Host, headers) always speak the OpenAI shape.
        either = {"anyOf": [error["application/json"]["schema"], refused["application/json"]["schema"]]}
        shared = {"application/json": {"schema": either}}
        found[str(status)] = {"description": text, "content": shared if status in (400, 403, 431) else error}
    if spec.path == "/ready":
        found["503"] = {"description": "Loading or draining", "content": refused}
    return found
