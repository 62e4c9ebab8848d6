"""What must survive the control plane's process: engines and whether they should run, processes and who started them, reservations.

SQLite in WAL mode. A change is acknowledged when its method returns; from then on a kill -9 of any process that uses the store does
not undo it (`synchronous=NORMAL`: a power cut may undo the last changes, and never damages the file). Several processes may use one
store. Hot state (loads, prefix index) is never here: it is rebuilt from the engines.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_protocol.errors import ResourceExhaustedError, UnavailableError

__all__ = ["EngineRecord", "ProcessRecord", "Store"]

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE engines (
            engine_id TEXT PRIMARY KEY, model_id TEXT NOT NULL, kind TEXT NOT NULL, host TEXT NOT NULL, port INTEGER NOT NULL,
            metadata TEXT NOT NULL, spec TEXT, desired TEXT NOT NULL, created_at REAL NOT NULL)""",
        """CREATE TABLE processes (
            engine_id TEXT PRIMARY KEY, pid INTEGER NOT NULL, identity TEXT NOT NULL, address TEXT NOT NULL, token TEXT NOT NULL,
            started_at REAL NOT NULL, owner TEXT NOT NULL, spec TEXT NOT NULL)""",
        """CREATE TABLE reservations (
            kind TEXT NOT NULL, resource TEXT NOT NULL, engine_id TEXT NOT NULL, PRIMARY KEY (kind, resource))""",
        "CREATE INDEX reservations_engine ON reservations (engine_id)",
    ),
)
"""Each entry takes the schema one version up, in one transaction. Entries are only ever appended."""


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that should exist.

    Attributes:
        engine_id, model_id, kind: who it is.
        host, port: where it listens, for one that somebody else runs.
        metadata: as it was registered.
        spec: how to start it, for one that we run.
        desired: whether it should be running.
        created_at: unix seconds.
    """

    engine_id: str
    model_id: str
    kind: str = "llm"
    host: str = ""
    port: int = 0
    metadata: dict[str, Any] = {}
    spec: EngineSpec | None = None
    desired: Literal["running", "stopped"] = "running"
    created_at: float = 0.0


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A process that a driver started.

    Attributes:
        engine_id: what it serves.
        pid: its number.
        identity: tells it from a later process of the same number (see `processes.identity`).
        address: where it listens.
        token: what it wants to hear over TCP.
        started_at: unix seconds.
        owner: identity of the process that watches it.
        spec: how it was started.
    """

    engine_id: str
    pid: int
    identity: str
    address: str
    token: str
    started_at: float
    owner: str
    spec: EngineSpec


class Store:
    """One open store; belongs to the thread that opened it.

    Args:
        path: the file; it is made with mode 0600, and its directory with 0700. None keeps everything in memory.

    Raises:
        UnavailableError: the file cannot be opened, is damaged, or was written by a newer release.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.touch(mode=0o600)
            self._db = sqlite3.connect(path or ":memory:", timeout=10.0, isolation_level=None)
        except (OSError, sqlite3.Error) as exc:
            raise UnavailableError(f"the store {path} cannot be opened: {exc}") from None
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._migrate()
        except sqlite3.DatabaseError as exc:
            self._db.close()
            raise UnavailableError(f"the store {path} cannot be used: {exc}: move it away to start afresh") from None
        except UnavailableError:
            self._db.close()
            raise

    def close(self) -> None:
        """Close it. Idempotent."""
        self._db.close()

    # engines

    def put_engine(self, record: EngineRecord) -> None:
        """Add an engine, or replace the one of that id."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO engines VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.engine_id,
                    record.model_id,
                    record.kind,
                    record.host,
                    record.port,
                    _text(record.metadata),
                    None if record.spec is None else _text(record.spec),
                    record.desired,
                    record.created_at,
                ),
            )

    def set_desired(self, engine_id: str, desired: Literal["running", "stopped"]) -> bool:
        """Say whether an engine should run; False if it is unknown."""
        with self._transaction() as db:
            done = db.execute("UPDATE engines SET desired = ? WHERE engine_id = ?", (desired, engine_id))
            return done.rowcount > 0

    def remove_engine(self, engine_id: str) -> bool:
        """Forget an engine and what is reserved for it; False if it was unknown."""
        with self._transaction() as db:
            db.execute("DELETE FROM reservations WHERE engine_id = ?", (engine_id,))
            return db.execute("DELETE FROM engines WHERE engine_id = ?", (engine_id,)).rowcount > 0

    def engines(self) -> list[EngineRecord]:
        """Return all engines, oldest first."""
        rows = self._db.execute(
            "SELECT engine_id, model_id, kind, host, port, metadata, spec, desired, created_at FROM engines "
            "ORDER BY created_at, engine_id"
        )
        return [
            EngineRecord(
                engine_id=row[0],
                model_id=row[1],
                kind=row[2],
                host=row[3],
                port=row[4],
                metadata=msgspec.json.decode(row[5]),
                spec=None if row[6] is None else msgspec.json.decode(row[6], type=EngineSpec),
                desired=row[7],
                created_at=row[8],
            )
            for row in rows
        ]

    # processes

    def put_process(self, record: ProcessRecord) -> None:
        """Note a process that was started for an engine."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO processes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.engine_id,
                    record.pid,
                    record.identity,
                    record.address,
                    record.token,
                    record.started_at,
                    record.owner,
                    _text(record.spec),
                ),
            )

    def claim_process(self, engine_id: str, old_owner: str, new_owner: str) -> bool:
        """Take a process over from an owner that has ended; False if somebody else was faster."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE processes SET owner = ? WHERE engine_id = ? AND owner = ?", (new_owner, engine_id, old_owner)
            )
            return done.rowcount > 0

    def remove_process(self, engine_id: str) -> None:
        """Forget the process of an engine."""
        with self._transaction() as db:
            db.execute("DELETE FROM processes WHERE engine_id = ?", (engine_id,))

    def processes(self) -> list[ProcessRecord]:
        """Return all processes."""
        rows = self._db.execute(
            "SELECT engine_id, pid, identity, address, token, started_at, owner, spec FROM processes ORDER BY started_at"
        )
        return [
            ProcessRecord(
                engine_id=row[0],
                pid=row[1],
                identity=row[2],
                address=row[3],
                token=row[4],
                started_at=row[5],
                owner=row[6],
                spec=msgspec.json.decode(row[7], type=EngineSpec),
            )
            for row in rows
        ]

    # reservations

    def reserve(
        self,
        kind: str,
        engine_id: str,
        candidates: Sequence[str],
        count: int = 1,
        *,
        usable: Callable[[str], bool] = lambda _: True,
    ) -> list[str]:
        """Reserve `count` of the candidates for an engine; what it holds already counts.

        Args:
            kind: ``port``, ``gpu``, ...
            engine_id: for whom.
            candidates: in order of preference.
            count: how many.
            usable: whether a free one can really be had (a port may be taken by a stranger).

        Raises:
            ResourceExhaustedError: too few are free; nothing is reserved then.
        """
        with self._transaction() as db:
            taken = dict(db.execute("SELECT resource, engine_id FROM reservations WHERE kind = ?", (kind,)).fetchall())
            chosen = [c for c in candidates if taken.get(c) == engine_id][:count]
            free = (c for c in candidates if c not in taken and usable(c))
            while len(chosen) < count:
                candidate = next(free, None)
                if candidate is None:
                    raise ResourceExhaustedError(
                        f"engine {engine_id!r} needs {count} of kind {kind}, {len(chosen)} of {len(candidates)} can be had: "
                        "stop an engine that holds one"
                    )
                db.execute("INSERT INTO reservations VALUES (?, ?, ?)", (kind, candidate, engine_id))
                chosen.append(candidate)
            return chosen

    def release(self, engine_id: str) -> None:
        """Give back all that is reserved for an engine."""
        with self._transaction() as db:
            db.execute("DELETE FROM reservations WHERE engine_id = ?", (engine_id,))

    def reservations(self) -> list[tuple[str, str, str]]:
        """Return (kind, resource, engine id) of every reservation."""
        return self._db.execute("SELECT kind, resource, engine_id FROM reservations ORDER BY 1, 2").fetchall()

    # inside

    def _migrate(self) -> None:
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                raise UnavailableError(
                    f"the store {self.path} has schema {version}, this release knows {len(MIGRATIONS)}: upgrade isagellm"
                )
            for number, statements in enumerate(MIGRATIONS[version:], version + 1):
                for statement in statements:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
