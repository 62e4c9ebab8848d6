"""Uploaded files and the results of batches."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import msgspec

from sagellm_gateway.ids import new_id
from sagellm_gateway.store.database import Database
from sagellm_protocol.errors import ResourceExhaustedError

__all__ = ["FileStore", "StoredFile"]


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file without its content. `created` is unix seconds."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created: float

    def json(self) -> dict[str, Any]:
        """Return the OpenAI `file` object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created),
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """The table of files. Every method takes the owner: one key never sees another's files.

    Args:
        database: where.
        stored_bytes: of all files of one owner.
    """

    def __init__(self, database: Database, stored_bytes: int) -> None:
        self._db = database
        self._bound = stored_bytes

    async def add(self, owner: str, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Store a file.

        Raises:
            ResourceExhaustedError: the owner's files would take more than they may.
        """
        made = StoredFile(
            id=new_id("file-"),
            filename=filename,
            purpose=purpose,
            bytes=len(content),
            created=time.time(),
        )

        def work(db: sqlite3.Connection) -> None:
            held = db.execute("SELECT COALESCE(SUM(bytes), 0) FROM files WHERE owner = ?", (owner,)).fetchone()[0]
            if held + made.bytes > self._bound:
                raise ResourceExhaustedError(
                    f"the key's files hold {held} bytes, with this one they would pass {self._bound}: delete some"
                )
            db.execute(
                "INSERT INTO files (id, owner, filename, purpose, bytes, created, content) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (made.id, owner, filename, purpose, made.bytes, made.created, content),
            )

        await self._db.run(work)
        return made

    async def find(self, owner: str, purpose: str | None = None) -> list[StoredFile]:
        """Return the files of `owner`, newest first."""

        def work(db: sqlite3.Connection) -> list[StoredFile]:
            rows = db.execute(
                "SELECT id, filename, purpose, bytes, created FROM files WHERE owner = :owner AND (purpose = :purpose OR :purpose IS NULL) "
                "ORDER BY created DESC, id LIMIT 10000",
                {"owner": owner, "purpose": purpose},
            ).fetchall()
            return [_file(row) for row in rows]

        return await self._db.run(work)

    async def get(self, owner: str, file_id: str) -> StoredFile | None:
        """Return a file of `owner`, or None."""

        def work(db: sqlite3.Connection) -> StoredFile | None:
            sql = "SELECT id, filename, purpose, bytes, created FROM files WHERE id = ? AND owner = ?"
            row = db.execute(sql, (file_id, owner)).fetchone()
            return None if row is None else _file(row)

        return await self._db.run(work)

    async def content(self, owner: str, file_id: str) -> bytes | None:
        """Return the bytes of a file of `owner`, or None."""

        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute("SELECT content FROM files WHERE id = ? AND owner = ?", (file_id, owner)).fetchone()
            return None if row is None else bytes(row[0])

        return await self._db.run(work)

    async def delete(self, owner: str, file_id: str) -> bool:
        """Remove a file of `owner`; False if there is none."""

        def work(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM files WHERE id = ? AND owner = ?", (file_id, owner)).rowcount > 0

        return await self._db.run(work)


def _file(row: Any) -> StoredFile:
    return StoredFile(id=row[0], filename=row[1], purpose=row[2], bytes=row[3], created=row[4])
