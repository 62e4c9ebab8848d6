"""API keys: only hashes are kept; who they belong to, what they may do, how much they may use, and what they used."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from typing import Literal, get_args

import msgspec

from sagellm_gateway.store.database import Database
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["ApiKey", "KeyStore", "Role", "UsageRow", "digest"]

Role = Literal["user", "metrics", "admin"]

_COLUMNS = "id, name, hash, role, created, revoked, requests_per_minute, tokens_per_minute, tokens_per_day"
_INSERT = f"INSERT INTO keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  (no value of a user in it)
_SELECT = f"SELECT {_COLUMNS} FROM keys ORDER BY created"  # noqa: S608  (no value of a user in it)


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key without its secret.

    Attributes:
        id: public name of the key; also the tenant of its requests.
        name: what a person calls it.
        hash: SHA-256 of the secret.
        role: ``user`` calls models, ``metrics`` reads metrics, ``admin`` does everything.
        created: unix seconds.
        revoked: unix seconds, or None while it is good.
        requests_per_minute: bound, or None.
        tokens_per_minute: bound on prompt and output tokens together, or None.
        tokens_per_day: budget of a UTC day, or None.
    """

    id: str
    name: str
    hash: bytes
    role: Role
    created: float
    revoked: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a key used of a model on a UTC day."""

    key: str
    day: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


def digest(secret: str) -> bytes:
    """Return the hash under which a secret is kept.

    A plain SHA-256 is enough: secrets are 256 random bits, so there is nothing to guess.
    """
    return hashlib.sha256(secret.encode()).digest()


def today() -> str:
    """Return the UTC day as ``YYYY-MM-DD``."""
    return time.strftime("%Y-%m-%d", time.gmtime())


class KeyStore:
    """The tables of keys and usage. Methods block for a moment; call them off the event loop, or use the async twins."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(
        self,
        name: str,
        role: Role = "user",
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        tokens_per_day: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; return it and its secret, which is shown this once.

        Raises:
            InvalidArgumentError: a bad role, name or bound.
        """
        key, secret = _new(name, role, requests_per_minute, tokens_per_minute, tokens_per_day)
        self.database.run_sync(lambda db: _insert(db, key))
        return key, secret

    async def add_async(self, name: str, role: Role = "user", **bounds: int | None) -> tuple[ApiKey, str]:
        """Do the same as `add` from the event loop."""
        key, secret = _new(
            name, role, bounds.get("requests_per_minute"), bounds.get("tokens_per_minute"), bounds.get("tokens_per_day")
        )
        await self.database.run(lambda db: _insert(db, key))
        return key, secret

    def ensure(self, secret: str, name: str, role: Role = "user") -> ApiKey:
        """Let in a secret that somebody else made (a mounted file); return its key. Once it is there nothing changes.

        Raises:
            InvalidArgumentError: it is shorter than 16 characters, or a bad name or role.
        """
        if len(secret) < 16:
            raise InvalidArgumentError("the secret is shorter than 16 characters: make a longer one", param="secret")
        fresh, _ = _new(name, role, None, None, None)
        key = msgspec.structs.replace(fresh, hash=digest(secret))
        return self.database.run_sync(lambda db: _find(db, key.hash) or _insert(db, key))

    def all(self) -> list[ApiKey]:
        """Return all keys, revoked ones too, oldest first."""
        return self.database.run_sync(_all)

    async def all_async(self) -> list[ApiKey]:
        """Do the same as `all` from the event loop."""
        return await self.database.run(_all)

    def revoke(self, key: str) -> bool:
        """End a key, by id or name; False if no good key is called that."""
        return self.database.run_sync(lambda db: _revoke(db, key))

    async def revoke_async(self, key: str) -> bool:
        """Do the same as `revoke` from the event loop."""
        return await self.database.run(lambda db: _revoke(db, key))

    async def version(self) -> tuple[int, int]:
        """Return a value that changes whenever this or another process writes to the file."""
        return await self.database.run(_version)

    async def record(self, rows: list[UsageRow]) -> None:
        """Add usage."""
        await self.database.run(lambda db: _record(db, rows))

    async def usage(self, key: str | None = None) -> list[UsageRow]:
        """Return usage, of one key or all, newest day first."""
        return await self.database.run(lambda db: _usage(db, key))

    async def used_on(self, day: str) -> dict[str, int]:
        """Return the tokens that each key used on a day."""

        def work(db: sqlite3.Connection) -> dict[str, int]:
            sql = "SELECT key, SUM(prompt_tokens + completion_tokens) FROM usage WHERE day = ? GROUP BY key"
            return dict(db.execute(sql, (day,)).fetchall())

        return await self.database.run(work)


def _new(name: str, role: str, rpm: int | None, tpm: int | None, tpd: int | None) -> tuple[ApiKey, str]:
    if role not in get_args(Role):
        raise InvalidArgumentError(f"role is {role!r}: use user, metrics or admin", param="role")
    if not name or len(name) > 128 or not name.isprintable():
        raise InvalidArgumentError("name must be 1 to 128 printable characters", param="name")
    for field, value in (("requests_per_minute", rpm), ("tokens_per_minute", tpm), ("tokens_per_day", tpd)):
        if value is not None and not 1 <= value < 2**53:
            raise InvalidArgumentError(f"{field} is {value}: it must be at least 1", param=field)
    secret = "sk-sage-" + secrets.token_urlsafe(32)
    key = ApiKey(
        id="key_" + secrets.token_hex(8),
        name=name,
        hash=digest(secret),
        role=role,  # type: ignore[arg-type]  # checked above
        created=time.time(),
        requests_per_minute=rpm,
        tokens_per_minute=tpm,
        tokens_per_day=tpd,
    )
    return key, secret


def _find(db: sqlite3.Connection, hashed: bytes) -> ApiKey | None:
    return next((key for key in _all(db) if key.hash == hashed), None)


def _insert(db: sqlite3.Connection, key: ApiKey) -> ApiKey:
    db.execute(_INSERT, msgspec.structs.astuple(key))
    return key


def _all(db: sqlite3.Connection) -> list[ApiKey]:
    rows = db.execute(_SELECT).fetchall()
    return [ApiKey(**dict(zip(ApiKey.__struct_fields__, row, strict=True))) for row in rows]


def _revoke(db: sqlite3.Connection, key: str) -> bool:
    sql = "UPDATE keys SET revoked = ? WHERE (id = ? OR name = ?) AND revoked IS NULL"
    return db.execute(sql, (time.time(), key, key)).rowcount > 0


def _version(db: sqlite3.Connection) -> tuple[int, int]:
    other = db.execute("PRAGMA data_version").fetchone()[0]
    return int(other), db.total_changes


def _record(db: sqlite3.Connection, rows: list[UsageRow]) -> None:
    db.executemany(
        "INSERT INTO usage (key, day, model, requests, prompt_tokens, completion_tokens) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (key, day, model) DO UPDATE SET requests = requests + excluded.requests, "
        "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
        "completion_tokens = completion_tokens + excluded.completion_tokens",
        [msgspec.structs.astuple(row) for row in rows],
    )


def _usage(db: sqlite3.Connection, key: str | None) -> list[UsageRow]:
    rows = db.execute(
        "SELECT key, day, model, requests, prompt_tokens, completion_tokens FROM usage WHERE key = :key OR :key IS NULL "
        "ORDER BY day DESC, key, model LIMIT 10000",
        {"key": key},
    ).fetchall()
    return [UsageRow(**dict(zip(UsageRow.__struct_fields__, row, strict=True))) for row in rows]
