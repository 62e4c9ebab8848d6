"""/openapi.json, /docs and the page at /: all from this package, nothing is fetched from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import resources

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.openapi import document
from sagellm_gateway.version import version

__all__ = ["docs", "docs_script", "openapi", "page", "page_script"]

_POLICY = (
    b"default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [(b"content-security-policy", _POLICY), (b"referrer-policy", b"no-referrer")]


@cache
def _file(name: str) -> bytes:
    return (resources.files("sagellm_gateway") / "web" / name).read_bytes()


@cache
def _document(secured: bool) -> bytes:
    from sagellm_gateway.routes.table import ROUTES

    return msgspec.json.encode(document(ROUTES, version(), secured=secured))


async def openapi(call: Call) -> None:
    """GET /openapi.json."""
    await call.reply(_document(call.gateway.keyring.demanded))


async def docs(call: Call) -> None:
    """GET /docs: the routes as a page."""
    await call.reply(_file("docs.html"), content_type=b"text/html; charset=utf-8", headers=_HEADERS)


async def docs_script(call: Call) -> None:
    """GET /docs.js."""
    await call.reply(_file("docs.js"), content_type=b"text/javascript; charset=utf-8")


async def page(call: Call) -> None:
    """GET /: a chat page."""
    await call.reply(_file("index.html"), content_type=b"text/html; charset=utf-8", headers=_HEADERS)


async def page_script(call: Call) -> None:
    """GET /chat.js."""
    await call.reply(_file("chat.js"), content_type=b"text/javascript; charset=utf-8")
