"""The old `/sessions` family: create, list, get, clear, rename, delete, clean up."""

from __future__ import annotations

from typing import Any

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.errors import HttpError
from sagellm_gateway.jsonbody import convert, decode_object
from sagellm_gateway.store.sessions import Session
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["cleanup", "clear", "create", "delete", "get", "list_all", "rename"]


class CreateBody(msgspec.Struct, kw_only=True):
    """The request body of create; it may be left out."""

    title: str | None = None


class RenameBody(msgspec.Struct, kw_only=True):
    """The request body of rename."""

    title: str


class CleanupBody(msgspec.Struct, kw_only=True):
    """The request body of cleanup; it may be left out."""

    max_age_minutes: float = 30.0


async def _optional_body(call: Call) -> dict[str, Any]:
    body = await call.body()
    return decode_object(body, call.gateway.config.limits.json_depth) if body.strip() else {}


def _json(session: Session) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(session)
    if session.messages is None:
        del plain["messages"]
    return plain


def _missing(call: Call) -> HttpError:
    return HttpError(404, f"the session {call.path('session')[:64]!r} does not exist", code="session_not_found")


def _title(title: str) -> str:
    if not title or len(title) > 256 or not title.isprintable():
        raise InvalidArgumentError("title must be 1 to 256 printable characters", param="title")
    return title


async def create(call: Call) -> None:
    """POST /sessions."""
    body = convert(await _optional_body(call), CreateBody)
    session = await call.gateway.sessions.create(call.principal.key_id, _title(body.title or "New session"))
    await call.json(_json(session), status=201)


async def list_all(call: Call) -> None:
    """GET /sessions."""
    found = await call.gateway.sessions.listed(call.principal.key_id)
    stats = {"total_sessions": len(found), "total_messages": sum(s.message_count for s in found)}
    await call.json({"sessions": [_json(s) for s in found], "stats": stats})


async def get(call: Call) -> None:
    """GET /sessions/{id}."""
    session = await call.gateway.sessions.get(call.principal.key_id, call.path("session"))
    if session is None:
        raise _missing(call)
    await call.json(_json(session))


async def clear(call: Call) -> None:
    """POST /sessions/{id}/clear."""
    if not await call.gateway.sessions.clear(call.principal.key_id, call.path("session")):
        raise _missing(call)
    await call.json({"status": "success"})


async def rename(call: Call) -> None:
    """PATCH /sessions/{id}/title."""
    body = convert(await call.json_object(), RenameBody)
    if not await call.gateway.sessions.rename(call.principal.key_id, call.path("session"), _title(body.title)):
        raise _missing(call)
    await call.json({"status": "success", "title": body.title})


async def delete(call: Call) -> None:
    """DELETE /sessions/{id}."""
    if not await call.gateway.sessions.delete(call.principal.key_id, call.path("session")):
        raise _missing(call)
    await call.json({"status": "success"})


async def cleanup(call: Call) -> None:
    """POST /sessions/cleanup: remove what was not used for a while."""
    body = convert(await _optional_body(call), CleanupBody)
    if not body.max_age_minutes >= 0:
        raise InvalidArgumentError("max_age_minutes must not be negative", param="max_age_minutes")
    cleaned = await call.gateway.sessions.cleanup(call.principal.key_id, body.max_age_minutes * 60)
    await call.json({"status": "success", "cleaned": cleaned})
