"""One SQLite file, one connection, one thread: calls from the event loop never block it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Database"]

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous TEXT, body BLOB NOT NULL, input BLOB NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used);
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS session_messages (
    session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE, position INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (session, position));
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, hash BLOB NOT NULL UNIQUE, role TEXT NOT NULL, created REAL NOT NULL,
    revoked REAL, requests_per_minute INTEGER, tokens_per_minute INTEGER, tokens_per_day INTEGER);
CREATE TABLE IF NOT EXISTS usage (
    key TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, PRIMARY KEY (key, day, model));
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
    created REAL NOT NULL, content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, state TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS batch_results (
    batch TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE, line INTEGER NOT NULL, failed INTEGER NOT NULL,
    body BLOB NOT NULL, PRIMARY KEY (batch, line));
"""


class Database:
    """The gateway's state file.

    Args:
        path: of the file; None keeps everything in memory.

    Raises:
        InvalidArgumentError: the file cannot be opened as a database.
    """

    def __init__(self, path: str | None = None) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gateway-state")
        try:
            self._connection = self._thread.submit(_open, path).result()
        except sqlite3.Error as error:
            self._thread.shutdown()
            raise InvalidArgumentError(f"the state file {path} cannot be opened: {error}", param="state_path") from None
        self._closed = False

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in a transaction on the database's thread and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, work)

    def run_sync(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do the same from a thread without an event loop."""
        return self._thread.submit(self._transaction, work).result()

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._connection:
            return work(self._connection)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._connection.close).result()
            self._thread.shutdown()


def _open(path: str | None) -> sqlite3.Connection:
    if path is not None:
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
        path = str(Path(path).expanduser())
    connection = sqlite3.connect(path or ":memory:", timeout=10, check_same_thread=False)
    # WAL with NORMAL survives kill -9 of the process; only a power cut can lose the last transactions.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.executescript(_SCHEMA)
    connection.commit()
    return connection
