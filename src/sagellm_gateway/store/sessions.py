"""Conversations that the server remembers for a client (the old `/sessions` family)."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import msgspec

from sagellm_gateway.ids import new_id
from sagellm_gateway.store.database import Database

__all__ = ["Session", "SessionStore"]


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation. Times are unix seconds."""

    id: str
    title: str
    created_at: float
    last_active: float
    message_count: int
    messages: list[dict[str, Any]] | None = None


class SessionStore:
    """The tables of sessions. Every method takes the owner: one key never sees another's sessions.

    Args:
        database: where.
        ttl_s: seconds without use after which a session is gone.
        limit: sessions of one owner; the least recently used go first.
        max_messages: of one session; appending beyond drops the oldest.
    """

    def __init__(self, database: Database, ttl_s: float, limit: int = 10_000, max_messages: int = 1000) -> None:
        self._db = database
        self._ttl = ttl_s
        self._limit = limit
        self._max = max_messages

    async def create(self, owner: str, title: str) -> Session:
        """Make an empty session."""
        now = time.time()
        session_id = new_id("sess_")

        def work(db: sqlite3.Connection) -> Session:
            db.execute("DELETE FROM sessions WHERE used < ?", (now - self._ttl,))
            db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", (session_id, owner, title, now, now))
            db.execute(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE owner = ? ORDER BY used DESC LIMIT -1 OFFSET ?)",
                (owner, self._limit),
            )
            return Session(id=session_id, title=title, created_at=now, last_active=now, message_count=0, messages=[])

        return await self._db.run(work)

    async def listed(self, owner: str, limit: int = 1000) -> list[Session]:
        """Return the sessions of `owner` without their messages, the last used first."""

        def work(db: sqlite3.Connection) -> list[Session]:
            rows = db.execute(
                "SELECT id, name, created, used, (SELECT COUNT(*) FROM session_messages WHERE session = id) "
                "FROM sessions WHERE owner = ? AND used >= ? ORDER BY used DESC, id LIMIT ?",
                (owner, time.time() - self._ttl, limit),
            ).fetchall()
            return [Session(id=r[0], title=r[1], created_at=r[2], last_active=r[3], message_count=r[4]) for r in rows]

        return await self._db.run(work)

    async def get(self, owner: str, session_id: str) -> Session | None:
        """Return a session with its messages, or None."""

        def work(db: sqlite3.Connection) -> Session | None:
            row = self._row(db, owner, session_id)
            if row is None:
                return None
            found = db.execute(
                "SELECT body FROM session_messages WHERE session = ? ORDER BY position", (session_id,)
            ).fetchall()
            messages = [msgspec.json.decode(m[0]) for m in found]
            return Session(
                id=row[0],
                title=row[1],
                created_at=row[2],
                last_active=row[3],
                message_count=len(messages),
                messages=messages,
            )

        return await self._db.run(work)

    def _row(self, db: sqlite3.Connection, owner: str, session_id: str) -> Any:
        return db.execute(
            "SELECT id, name, created, used FROM sessions WHERE id = ? AND owner = ? AND used >= ?",
            (session_id, owner, time.time() - self._ttl),
        ).fetchone()

    async def append(self, owner: str, session_id: str, messages: list[dict[str, Any]]) -> bool:
        """Add messages at the end; False if there is no such session."""
        now = time.time()

        def work(db: sqlite3.Connection) -> bool:
            if self._row(db, owner, session_id) is None:
                return False
            last = db.execute(
                "SELECT COALESCE(MAX(position), -1) FROM session_messages WHERE session = ?", (session_id,)
            ).fetchone()[0]
            rows = [
                (session_id, last + 1 + i, msgspec.json.encode({**m, "timestamp": now})) for i, m in enumerate(messages)
            ]
            db.executemany("INSERT INTO session_messages VALUES (?, ?, ?)", rows)
            oldest = last + len(rows) - self._max
            db.execute("DELETE FROM session_messages WHERE session = ? AND position <= ?", (session_id, oldest))
            db.execute("UPDATE sessions SET used = ? WHERE id = ?", (now, session_id))
            return True

        return await self._db.run(work)

    async def clear(self, owner: str, session_id: str) -> bool:
        """Drop the messages of a session; False if there is no such session."""

        def work(db: sqlite3.Connection) -> bool:
            if self._row(db, owner, session_id) is None:
                return False
            db.execute("DELETE FROM session_messages WHERE session = ?", (session_id,))
            db.execute("UPDATE sessions SET used = ? WHERE id = ?", (time.time(), session_id))
            return True

        return await self._db.run(work)

    async def rename(self, owner: str, session_id: str, title: str) -> bool:
        """Give a session a title; False if there is no such session."""

        def work(db: sqlite3.Connection) -> bool:
            if self._row(db, owner, session_id) is None:
                return False
            db.execute("UPDATE sessions SET name = ?, used = ? WHERE id = ?", (title, time.time(), session_id))
            return True

        return await self._db.run(work)

    async def delete(self, owner: str, session_id: str) -> bool:
        """Remove a session; False if there is no such session."""

        def work(db: sqlite3.Connection) -> bool:
            found = db.execute("DELETE FROM sessions WHERE id = ? AND owner = ?", (session_id, owner))
            return found.rowcount > 0

        return await self._db.run(work)

    async def cleanup(self, owner: str, max_age_s: float) -> int:
        """Remove the sessions of `owner` that were not used for `max_age_s` seconds; return their number."""

        def work(db: sqlite3.Connection) -> int:
            sql = "DELETE FROM sessions WHERE owner = ? AND used < ?"
            return db.execute(sql, (owner, time.time() - max_age_s)).rowcount

        return await self._db.run(work)
