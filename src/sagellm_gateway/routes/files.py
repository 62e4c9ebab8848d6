"""/v1/files and /v1/batches."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import msgspec

from sagellm_gateway.batches import ENDPOINTS
from sagellm_gateway.context import Call
from sagellm_gateway.errors import HttpError
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.multipart import parse
from sagellm_gateway.store.files import StoredFile
from sagellm_protocol.errors import InvalidArgumentError

__all__ = [
    "FORM",
    "cancel_batch",
    "create_batch",
    "delete_file",
    "get_batch",
    "get_file",
    "list_batches",
    "list_files",
    "read_file",
    "upload",
]

T = TypeVar("T")
_PURPOSES = ("batch", "user_data")
FORM = {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": list(_PURPOSES)}}


async def upload(call: Call) -> None:
    """POST /v1/files: a form with `file` and `purpose`."""
    content_type = call.header(b"content-type") or b""
    parts = {p.name: p for p in parse(content_type, await call.body(call.gateway.config.limits.file_bytes))}
    file, purpose = parts.get("file"), parts.get("purpose")
    if file is None or file.filename is None:
        raise InvalidArgumentError("file is missing", param="file")
    if purpose is None:
        raise InvalidArgumentError("purpose is missing", param="purpose")
    said = purpose.content.decode(errors="replace")
    if said not in _PURPOSES:
        raise InvalidArgumentError(f"purpose is {said[:40]!r}: use {' or '.join(_PURPOSES)}", param="purpose")
    # The name is only ever shown; nothing is opened by it.
    name = file.filename.replace("\\", "/").rsplit("/", 1)[-1][:255] or "file"
    if not name.isprintable():
        raise InvalidArgumentError("the file's name holds a control character", param="file")
    made = await call.gateway.files.add(call.principal.key_id, name, said, file.content)
    await call.json(made.json())


def _paged(call: Call, items: list[T], ids: list[str]) -> tuple[list[T], bool]:
    query = call.query()
    raw = query.get("limit", "20" if call.scope["path"].endswith("batches") else "10000")
    if not raw.isdigit() or not 1 <= int(raw[:6]) <= 10_000:
        raise InvalidArgumentError("limit must be 1 to 10000", param="limit")
    after = query.get("after")
    start = 0
    if after is not None:
        if after not in ids:
            raise InvalidArgumentError("after is not the id of an entry", param="after")
        start = ids.index(after) + 1
    page = items[start : start + int(raw)]
    return page, len(items) > start + len(page)


def _list(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


async def list_files(call: Call) -> None:
    """GET /v1/files."""
    found = await call.gateway.files.find(call.principal.key_id, call.query().get("purpose"))
    page, more = _paged(call, found, [f.id for f in found])
    await call.json(_list([f.json() for f in page], more))


async def _file(call: Call, file_id: str, param: str = "file_id") -> StoredFile:
    found = await call.gateway.files.get(call.principal.key_id, file_id)
    if found is None:
        raise HttpError(404, f"the file {file_id[:64]!r} does not exist", code="file_not_found", param=param)
    return found


async def get_file(call: Call) -> None:
    """GET /v1/files/{id}."""
    await call.json((await _file(call, call.path("file"))).json())


async def read_file(call: Call) -> None:
    """GET /v1/files/{id}/content."""
    found = await _file(call, call.path("file"))
    content = await call.gateway.files.content(call.principal.key_id, found.id)
    await call.reply(content or b"", content_type=b"application/octet-stream")


async def delete_file(call: Call) -> None:
    """DELETE /v1/files/{id}."""
    found = await _file(call, call.path("file"))
    await call.gateway.files.delete(call.principal.key_id, found.id)
    await call.json({"id": found.id, "object": "file", "deleted": True})


class BatchBody(msgspec.Struct, kw_only=True):
    """The request body of /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


async def create_batch(call: Call) -> None:
    """POST /v1/batches: the lines of a file run at background priority; results are files."""
    body = convert(await call.json_object(), BatchBody)
    if body.endpoint not in ENDPOINTS:
        raise InvalidArgumentError(f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    if body.completion_window != "24h":
        raise InvalidArgumentError("completion_window must be 24h", param="completion_window")
    file = await _file(call, body.input_file_id, "input_file_id")
    if file.purpose != "batch":
        raise InvalidArgumentError("the input file's purpose is not batch", param="input_file_id")
    now = int(time.time())
    stamps = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    batch: dict[str, Any] = {
        "id": new_id("batch_"),
        "object": "batch",
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + 86400,
        **{f"{stamp}_at": None for stamp in stamps},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
    }
    await call.gateway.batches.put(call.principal.key_id, batch)
    answer = msgspec.json.encode(batch)
    call.gateway.runner.start(call.principal.key_id, batch)
    await call.reply(answer)


async def list_batches(call: Call) -> None:
    """GET /v1/batches."""
    found = await call.gateway.batches.find(call.principal.key_id)
    page, more = _paged(call, found, [b["id"] for b in found])
    await call.json(_list(page, more))


async def _batch(call: Call) -> dict[str, Any]:
    batch_id = call.path("batch")
    found = await call.gateway.batches.get(call.principal.key_id, batch_id)
    if found is None:
        raise HttpError(404, f"the batch {batch_id[:64]!r} does not exist", code="batch_not_found", param="batch_id")
    return found


async def get_batch(call: Call) -> None:
    """GET /v1/batches/{id}."""
    await call.json(await _batch(call))


async def cancel_batch(call: Call) -> None:
    """POST /v1/batches/{id}/cancel: the lines that are done keep their results."""
    await call.json(await call.gateway.runner.cancel(call.principal.key_id, await _batch(call)))
