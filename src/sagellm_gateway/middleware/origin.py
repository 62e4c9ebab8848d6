"""Host allow-list (against DNS rebinding) and strict CORS (against web pages that talk to a local server)."""

from __future__ import annotations

import ipaddress
from typing import Any

from sagellm_gateway.config import Origins
from sagellm_gateway.context import Message, Receive, Scope, Send
from sagellm_gateway.errors import HttpError
from sagellm_gateway.middleware.edge import refuse

__all__ = ["OriginGuard", "host_is_allowed"]

_METHODS = b"GET, POST, PUT, PATCH, DELETE, OPTIONS"
_HEADERS = b"authorization, content-type, x-api-key, x-request-id, anthropic-version, anthropic-beta"


def host_is_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Return whether `host` (the header's value) is an IP address, localhost, or one of `allowed`."""
    if not host or len(host) > 260:
        return False
    name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if not name:
        name, port = host, ""
    if port and not (port.isascii() and port.isdigit() and len(port) <= 5):
        return False
    name = name.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost") or "*" in allowed or name in allowed:
        return all(c.isascii() and (c.isalnum() or c in "-._[]:") for c in name)
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


class OriginGuard:
    """Refuses a foreign `Host` and a foreign `Origin`; answers preflights of the allowed ones."""

    def __init__(self, app: Any, origins: Origins) -> None:
        self.app = app
        self.hosts = tuple(h.lower() for h in origins.hosts)
        self.cors = {o.rstrip("/").encode() for o in origins.cors}
        self._good: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        hosts = []
        origin = site = None
        for name, value in scope["headers"]:
            if name == b"host":
                hosts.append(value)
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        problem = self._problem(scope, hosts, origin, site)
        if problem is not None:
            await refuse(problem, scope, send)
        elif origin is None:
            await self.app(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await self._preflight(origin, send)
        else:
            await self.app(scope, receive, self._with_cors(origin, send))

    def _problem(self, scope: Scope, hosts: list[bytes], origin: bytes | None, site: bytes | None) -> HttpError | None:
        if len(hosts) != 1:
            if not hosts and scope.get("http_version") == "1.0":
                return None
            return HttpError(400, f"{len(hosts)} Host headers: send exactly one", code="invalid_host")
        host = hosts[0]
        if host not in self._good:
            if not host_is_allowed(host.decode("latin-1"), self.hosts):
                return HttpError(
                    403,
                    "this Host is not on the server's list: start it with --allowed-host NAME",
                    code="host_not_allowed",
                )
            if len(self._good) < 256:
                self._good.add(host)
        if origin is not None and not self._same_or_allowed(origin, host):
            return HttpError(
                403,
                "this web origin may not call the server: start it with --cors-origin ORIGIN",
                code="origin_not_allowed",
            )
        if origin is None and site == b"cross-site" and scope["method"] not in ("GET", "HEAD"):
            return HttpError(403, "a cross-site request of a web page is not accepted", code="origin_not_allowed")
        return None

    def _same_or_allowed(self, origin: bytes, host: bytes) -> bool:
        return origin in (b"http://" + host, b"https://" + host) or origin in self.cors or b"*" in self.cors

    def _cors_headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        allow = b"*" if b"*" in self.cors else origin
        return [
            (b"access-control-allow-origin", allow),
            (b"access-control-expose-headers", b"x-request-id, x-sagellm-ignored-params, retry-after"),
            (b"vary", b"Origin"),
        ]

    async def _preflight(self, origin: bytes, send: Send) -> None:
        headers = [
            *self._cors_headers(origin),
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", _HEADERS),
            (b"access-control-max-age", b"600"),
            (b"content-length", b"0"),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _with_cors(self, origin: bytes, send: Send) -> Send:
        extra = self._cors_headers(origin)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        return answer
