"""Names of KV blocks by content, the same in every engine and in the control plane's prefix index.

The name of a full block is a hash of its parent's name and its own token ids, chained from a root that depends on the
adapter and on the tenant's salt. Two sequences share exactly the blocks whose names are equal.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import msgspec

__all__ = ["BYTES_PER_TOKEN", "BlockEvent", "BlockSnapshot", "block_hash", "block_hashes", "root_hash", "text_hashes"]

HASH_BYTES = 16
BYTES_PER_TOKEN = 4
"""Of text, where only an estimate of its tokens can be had."""


class BlockEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change of what an engine's prefix cache holds.

    Attributes:
        seq: grows by one with each event of an engine; a gap means that events were lost and the index must start afresh.
        kind: ``stored`` and ``removed`` name one block; ``cleared`` empties the cache.
        block_hash: the block's name; empty for ``cleared``.
        parent_hash: the name of the block (or root) before it; only for ``stored``.
    """

    seq: int
    kind: Literal["stored", "removed", "cleared"]
    block_hash: bytes = b""
    parent_hash: bytes = b""


class BlockSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All named blocks of an engine, least recently used first, as they are after event number `seq`."""

    seq: int
    names: tuple[bytes, ...]


@lru_cache(maxsize=1024)
def root_hash(adapter: str | None, salt: str) -> bytes:
    """Return the 16-byte root of all chains of one adapter and one tenant's salt."""
    digest = blake2b(digest_size=HASH_BYTES, person=b"sagellm-kv-root")
    for part in ((adapter or "").encode(), salt.encode()):
        digest.update(struct.pack("<q", len(part)) + part)
    return digest.digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the 16-byte name of the block with `token_ids` that follows `parent`."""
    return blake2b(parent + struct.pack(f"<{len(token_ids)}i", *token_ids), digest_size=HASH_BYTES).digest()


def block_hashes(
    token_ids: Sequence[int], *, block_size: int = 16, adapter: str | None = None, salt: str = ""
) -> list[bytes]:
    """Return the names of all full blocks of `token_ids`, first to last."""
    count = len(token_ids) // block_size * block_size
    return _chain(struct.pack(f"<{count}i", *token_ids[:count]), 4 * block_size, adapter, salt)


def text_hashes(text: bytes, *, block_bytes: int, adapter: str | None = None, salt: str = "") -> list[bytes]:
    """Return names in the same manner for a prompt whose token ids are not known: of its text, in pieces of `block_bytes`."""
    return _chain(text[: len(text) // block_bytes * block_bytes], block_bytes, adapter, salt)


def _chain(data: bytes, step: int, adapter: str | None, salt: str) -> list[bytes]:
    out: list[bytes] = []
    parent = root_hash(adapter, salt)
    for start in range(0, len(data), step):
        parent = blake2b(parent + data[start : start + step], digest_size=HASH_BYTES).digest()
        out.append(parent)
    return out
