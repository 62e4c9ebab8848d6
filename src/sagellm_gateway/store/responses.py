"""Stored responses: bounded by number (least recently used goes) and by age; one key never sees another's."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import msgspec

from sagellm_gateway.store.database import Database

__all__ = ["ResponseStore", "StoredResponse"]


class StoredResponse(msgspec.Struct, kw_only=True):
    """A response as it was last seen, and the input items that were its own."""

    id: str
    body: dict[str, Any]
    input: list[dict[str, Any]]
    previous: str | None = None


class ResponseStore:
    """The table of responses.

    Args:
        database: where.
        limit: rows to keep.
        ttl_s: seconds to keep a row after its creation.
    """

    def __init__(self, database: Database, limit: int, ttl_s: float) -> None:
        self._db = database
        self._limit = limit
        self._ttl = ttl_s

    async def put(self, owner: str, stored: StoredResponse) -> None:
        """Insert or replace a response."""
        now = time.time()
        row = (
            stored.id,
            owner,
            stored.previous,
            msgspec.json.encode(stored.body),
            msgspec.json.encode(stored.input),
            now,
            now,
        )

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO responses (id, owner, previous, body, input, created, used) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET body = excluded.body, used = excluded.used",
                row,
            )
            db.execute("DELETE FROM responses WHERE created < ?", (now - self._ttl,))
            db.execute(
                "DELETE FROM responses WHERE id IN (SELECT id FROM responses ORDER BY used DESC LIMIT -1 OFFSET ?)",
                (self._limit,),
            )

        await self._db.run(work)

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """Return a response of `owner`, or None."""

        def work(db: sqlite3.Connection) -> StoredResponse | None:
            now = time.time()
            row = db.execute(
                "SELECT id, body, input, previous FROM responses WHERE id = ? AND owner = ? AND created >= ?",
                (response_id, owner, now - self._ttl),
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE responses SET used = ? WHERE id = ?", (now, response_id))
            body, items = msgspec.json.decode(row[1]), msgspec.json.decode(row[2])
            return StoredResponse(id=row[0], body=body, input=items, previous=row[3])

        return await self._db.run(work)

    async def delete(self, owner: str, response_id: str) -> bool:
        """Remove a response of `owner`; False if there is none."""

        def work(db: sqlite3.Connection) -> bool:
            found = db.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (response_id, owner))
            return found.rowcount > 0

        return await self._db.run(work)

    async def fail_unfinished(self) -> int:
        """Mark responses that an earlier process left unfinished as failed; return their number."""

        def work(db: sqlite3.Connection) -> int:
            rows = db.execute(
                "SELECT id, body FROM responses WHERE json_extract(body, '$.status') IN ('queued', 'in_progress')"
            ).fetchall()
            for response_id, raw in rows:
                body = msgspec.json.decode(raw)
                body["status"] = "failed"
                body["error"] = {
                    "code": "server_error",
                    "message": "the server was restarted before the answer was complete",
                }
                db.execute("UPDATE responses SET body = ? WHERE id = ?", (msgspec.json.encode(body), response_id))
            return len(rows)

        return await self._db.run(work)
