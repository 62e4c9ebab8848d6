"""Path -> endpoint. Exact paths by one dictionary look-up; patterns (``{name}`` one segment, ``{name:path}`` the rest) in turn."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sagellm_gateway.context import Endpoint, Gateway, Receive, Scope, Send
from sagellm_gateway.errors import HttpError, Shape, anthropic_body, ollama_body, openai_body
from sagellm_gateway.middleware.edge import refuse
from sagellm_gateway.routes.table import RouteSpec

__all__ = ["Router", "shape_of"]


class Router:
    """ASGI application that picks the endpoint; unknown paths and methods get the error shape of their neighbourhood.

    Args:
        gateway: shared parts.
        routes: the table.
        prefix: an old prefix (``/api``) under which the paths of `aliased` answer too.
        aliased: first segments that the prefix covers, for example ``v1``.
    """

    def __init__(
        self, gateway: Gateway, routes: Iterable[RouteSpec], *, prefix: str = "/api", aliased: Iterable[str] = ()
    ) -> None:
        self.exact: dict[str, dict[str, tuple[RouteSpec, Endpoint]]] = {}
        self.patterns: list[tuple[re.Pattern[str], dict[str, tuple[RouteSpec, Endpoint]]]] = []
        by_pattern: dict[str, dict[str, tuple[RouteSpec, Endpoint]]] = {}
        self.prefix, self.aliased = prefix, frozenset(aliased)
        for spec in routes:
            target = by_pattern if "{" in spec.path else self.exact
            target.setdefault(spec.path, {})[spec.method] = (spec, Endpoint(gateway, spec.handler, spec.shape))
        for path, methods in by_pattern.items():
            self.patterns.append((_compiled(path), methods))

    def find(self, scope: Scope) -> tuple[RouteSpec, Endpoint] | HttpError:
        """Return the row and endpoint of a request, or the refusal; fills ``path_params``."""
        path = scope["path"]
        methods = self.exact.get(path)
        if methods is None and path.startswith(self.prefix + "/"):
            short = path[len(self.prefix) :]
            if short.split("/", 2)[1] in self.aliased:
                path = short
                methods = self.exact.get(path)
        if methods is None:
            methods = self._match(path, scope)
        if methods is None:
            return HttpError(404, "no such route: GET /openapi.json lists them", code="unknown_url")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        found = methods.get(method)
        if found is not None:
            return found
        allow = ", ".join(sorted(methods)).encode()
        return HttpError(
            405, f"this route takes {allow.decode()}", code="method_not_allowed", headers=((b"allow", allow),)
        )

    def _match(self, path: str, scope: Scope) -> dict[str, tuple[RouteSpec, Endpoint]] | None:
        for regex, methods in self.patterns:
            match = regex.match(path)
            if match is not None:
                scope["path_params"] = match.groupdict()
                return methods
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        found = scope["sagellm.found"] if "sagellm.found" in scope else self.find(scope)
        if isinstance(found, HttpError):
            await refuse(found, scope, send, shape_of(scope["path"]))
            return
        scope["sagellm.route"] = found[0].path
        await found[1](scope, receive, send)


def _compiled(path: str) -> re.Pattern[str]:
    pattern = re.escape(path).replace(r"\{", "{").replace(r"\}", "}")
    pattern = re.sub(r"\{(\w+):path\}", r"(?P<\1>.+)", pattern)
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)
    return re.compile(f"^{pattern}$", re.DOTALL)


def shape_of(path: str) -> Shape:
    """Return the error shape of the dialect that a path belongs to."""
    if path.startswith("/v1/messages"):
        return anthropic_body
    return ollama_body if path.startswith("/api/") else openai_body
