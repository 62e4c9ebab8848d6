"""Batches and the results of their lines, kept line by line so that a restart goes on where it stopped."""

from __future__ import annotations

import sqlite3
from typing import Any

import msgspec

from sagellm_gateway.store.database import Database

__all__ = ["BatchStore"]


class BatchStore:
    """The tables of batches; a batch is kept as its OpenAI object."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def put(self, owner: str, batch: dict[str, Any]) -> None:
        """Insert or replace a batch."""
        body = msgspec.json.encode(batch)

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO batches (id, owner, created, state, body) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET state = excluded.state, body = excluded.body",
                (batch["id"], owner, batch["created_at"], batch["status"], body),
            )

        await self._db.run(work)

    async def get(self, owner: str, batch_id: str) -> dict[str, Any] | None:
        """Return a batch of `owner`, or None."""

        def work(db: sqlite3.Connection) -> dict[str, Any] | None:
            row = db.execute("SELECT body FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)).fetchone()
            return None if row is None else msgspec.json.decode(row[0], type=dict[str, Any])

        return await self._db.run(work)

    async def find(self, owner: str) -> list[dict[str, Any]]:
        """Return the batches of `owner`, newest first."""

        def work(db: sqlite3.Connection) -> list[dict[str, Any]]:
            sql = "SELECT body FROM batches WHERE owner = ? ORDER BY created DESC, id LIMIT 1000"
            return [msgspec.json.decode(row[0]) for row in db.execute(sql, (owner,)).fetchall()]

        return await self._db.run(work)

    async def unfinished(self) -> list[tuple[str, dict[str, Any]]]:
        """Return owner and batch of those that an earlier process left under way."""

        def work(db: sqlite3.Connection) -> list[tuple[str, dict[str, Any]]]:
            sql = "SELECT owner, body FROM batches WHERE state IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
            return [(row[0], msgspec.json.decode(row[1])) for row in db.execute(sql).fetchall()]

        return await self._db.run(work)

    async def done_lines(self, batch_id: str) -> dict[int, bool]:
        """Return line number -> whether it failed, of the lines that have a result."""

        def work(db: sqlite3.Connection) -> dict[int, bool]:
            sql = "SELECT line, failed FROM batch_results WHERE batch = ?"
            return {row[0]: bool(row[1]) for row in db.execute(sql, (batch_id,)).fetchall()}

        return await self._db.run(work)

    async def add_result(self, batch_id: str, line: int, *, failed: bool, body: bytes) -> None:
        """Keep the result of a line."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO batch_results VALUES (?, ?, ?, ?)", (batch_id, line, int(failed), body))

        await self._db.run(work)

    async def results(self, batch_id: str, *, failed: bool) -> bytes:
        """Return the results as JSON lines, in the order of the input."""

        def work(db: sqlite3.Connection) -> bytes:
            sql = "SELECT body FROM batch_results WHERE batch = ? AND failed = ? ORDER BY line"
            rows = db.execute(sql, (batch_id, int(failed))).fetchall()
            return b"".join(bytes(row[0]) + b"\n" for row in rows)

        return await self._db.run(work)
