"""The keys in memory: who a request is from, whether its rate and budget allow it, and what it used."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import NamedTuple

from sagellm_gateway.context import ANONYMOUS, Headers, Principal, Scope
from sagellm_gateway.errors import HttpError
from sagellm_gateway.store.keys import ApiKey, KeyStore, UsageRow, digest, today
from sagellm_protocol.errors import UnauthenticatedError

__all__ = ["Bucket", "KeyRing"]

_REFRESH_S = 1.0
_FLUSH_S = 2.0


class Bucket:
    """A token bucket: `per_minute` units refill evenly, at most that many are saved up."""

    __slots__ = ("at", "level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self.at = now

    def refill(self, now: float) -> None:
        """Add what time has brought."""
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def wait_for(self, amount: float) -> float:
        """Return the seconds until `amount` is there (0 if it is)."""
        return max(0.0, (amount - self.level) * 60 / self.per_minute)


class _Entry(NamedTuple):
    key: ApiKey
    principal: Principal
    requests: Bucket | None
    tokens: Bucket | None


class KeyRing:
    """Keys of the store, refreshed within a second of a change by any process.

    Args:
        store: the tables.
        required: whether a key is demanded; None means: when there is one.
        key_bytes: longest key that is looked at.
    """

    def __init__(self, store: KeyStore, required: bool | None, key_bytes: int) -> None:
        self._store = store
        self._required = required
        self._key_bytes = key_bytes
        self._entries: dict[bytes, _Entry] = {}
        self._by_id: dict[str, _Entry] = {}
        self._version: tuple[int, int] | None = None
        self._checked = float("-inf")
        self._refreshing: asyncio.Lock | None = None
        self._used_today: dict[str, int] = {}
        self._day = ""
        self._pending: dict[tuple[str, str, str], list[int]] = {}
        self._spent: dict[str, list[int]] = {}

    async def refresh(self, *, force: bool = False) -> None:
        """Read the keys again if the file has changed."""
        if not force and time.monotonic() - self._checked < _REFRESH_S:
            return
        if self._refreshing is None:
            self._refreshing = asyncio.Lock()
        async with self._refreshing:
            if not force and time.monotonic() - self._checked < _REFRESH_S:
                return
            version = await self._store.version()
            if version != self._version:
                self._load(await self._store.all_async())
                self._version = version
            if self._day != today():
                self._day = today()
                self._used_today = await self._store.used_on(self._day)
            self._checked = time.monotonic()

    def _load(self, keys: list[ApiKey]) -> None:
        now = time.monotonic()
        entries = {}
        for key in keys:
            if key.revoked is not None:
                continue
            old = self._entries.get(key.hash)
            if old is not None and old.key == key:
                entries[key.hash] = old
                continue
            principal = Principal(key_id=key.id, name=key.name, role=key.role)
            requests = Bucket(key.requests_per_minute, now) if key.requests_per_minute else None
            tokens = Bucket(key.tokens_per_minute, now) if key.tokens_per_minute else None
            entries[key.hash] = _Entry(key, principal, requests, tokens)
        self._entries = entries
        self._by_id = {e.key.id: e for e in entries.values()}

    @property
    def demanded(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._entries) if self._required is None else self._required

    async def identify(self, scope: Scope) -> Principal:
        """Return who sent the request.

        Raises:
            UnauthenticatedError: no key, or one that is not known.
            HttpError: 400, more than one key.
        """
        if time.monotonic() - self._checked >= _REFRESH_S:
            await self.refresh()
        if not self.demanded:
            return ANONYMOUS
        secret = _secret(scope, self._key_bytes)
        if secret is None:
            raise UnauthenticatedError("no API key: send Authorization: Bearer KEY or x-api-key: KEY")
        hashed = digest(secret)
        entry = self._entries.get(hashed)
        if entry is None or not hmac.compare_digest(entry.key.hash, hashed):
            raise UnauthenticatedError("the API key is not known: check it, or ask for a new one")
        return entry.principal

    def take(self, principal: Principal) -> Headers:
        """Take one request from the key's rate; return the headers that tell what is left.

        Raises:
            HttpError: 429, over a rate or the daily budget.
        """
        entry = self._by_id.get(principal.key_id)
        if entry is None:
            return []
        now = time.monotonic()
        headers: Headers = []
        for bucket, name, amount in ((entry.requests, "requests", 1.0), (entry.tokens, "tokens", 0.0)):
            if bucket is None:
                continue
            bucket.refill(now)
            wait = bucket.wait_for(max(amount, 1e-9))
            if wait > 0:
                raise HttpError(
                    429,
                    f"the key is over its rate of {bucket.per_minute} {name} a minute: wait {wait:.1f} s",
                    code="rate_limit_exceeded",
                    retry_after_s=wait,
                    headers=tuple(_rate_headers(bucket, name)),
                )
            bucket.level -= amount
            headers += _rate_headers(bucket, name)
        budget = entry.key.tokens_per_day
        if budget is not None and self._used_today.get(principal.key_id, 0) >= budget:
            left = 86400 - time.time() % 86400
            raise HttpError(
                429,
                f"the key has used its {budget} tokens of this UTC day",
                code="insufficient_quota",
                retry_after_s=left,
            )
        self._spend(principal.key_id, 1, 0)
        return headers

    def _spend(self, key_id: str, requests: int, tokens: int) -> None:
        spent = self._spent.setdefault(key_id, [0, 0])
        spent[0] += requests
        spent[1] += tokens

    def take_spent(self) -> dict[str, list[int]]:
        """Return requests and tokens by key that were spent here since the last call."""
        spent, self._spent = self._spent, {}
        return spent

    def spent_elsewhere(self, spent: dict[str, list[int]]) -> None:
        """Take what other processes of the port have spent from the rates and budgets here."""
        now = time.monotonic()
        for key_id, (requests, tokens) in spent.items():
            self._used_today[key_id] = self._used_today.get(key_id, 0) + tokens
            entry = self._by_id.get(key_id)
            if entry is None:
                continue
            for bucket, amount in ((entry.requests, requests), (entry.tokens, tokens)):
                if bucket is not None:
                    bucket.refill(now)
                    bucket.level -= amount

    def used(self, principal: Principal, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Note what a request used."""
        if not principal.key_id:
            return
        total = prompt_tokens + completion_tokens
        self._spend(principal.key_id, 0, total)
        entry = self._by_id.get(principal.key_id)
        if entry is not None and entry.tokens is not None:
            # May go below zero: the next request waits until it has been paid for.
            entry.tokens.level -= total
        self._used_today[principal.key_id] = self._used_today.get(principal.key_id, 0) + total
        row = self._pending.setdefault((principal.key_id, today(), model), [0, 0, 0])
        row[0] += 1
        row[1] += prompt_tokens
        row[2] += completion_tokens

    async def flush(self) -> None:
        """Write what was used to the store."""
        pending, self._pending = self._pending, {}
        if pending:
            await self._store.record(
                [
                    UsageRow(key=k, day=d, model=m, requests=r, prompt_tokens=p, completion_tokens=c)
                    for (k, d, m), (r, p, c) in pending.items()
                ]
            )

    async def keep_flushing(self) -> None:
        """Flush every two seconds until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self.flush()


def _secret(scope: Scope, key_bytes: int) -> str | None:
    found: set[bytes] = set()
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            found.add(value)
        elif name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            if scheme.lower() != b"bearer":
                raise HttpError(401, "Authorization must be: Bearer KEY", code="invalid_api_key")
            found.add(credentials.strip())
    if len(found) > 1:
        raise HttpError(400, "the request carries more than one API key: send one", code="invalid_header")
    if not found:
        return None
    secret = found.pop()
    if len(secret) > key_bytes:
        raise HttpError(401, f"the API key is longer than {key_bytes} bytes", code="invalid_api_key")
    return secret.decode("latin-1")


def _rate_headers(bucket: Bucket, name: str) -> Headers:
    reset = (bucket.per_minute - bucket.level) * 60 / bucket.per_minute
    return [
        (f"x-ratelimit-limit-{name}".encode(), str(bucket.per_minute).encode()),
        (f"x-ratelimit-remaining-{name}".encode(), str(max(0, int(bucket.level))).encode()),
        (f"x-ratelimit-reset-{name}".encode(), f"{max(0.0, reset):.2f}s".encode()),
    ]
