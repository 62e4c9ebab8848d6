"""Handing the KV blocks of a prompt from one engine to another on the same machine.

The engine that has them writes them to a file in shared memory and gives out a ticket; the other reads the file by the ticket, checks every
block, and keeps them as cached prefix. Whatever goes wrong costs only a prefill: nothing depends on the blocks having arrived.
"""

from __future__ import annotations

import msgspec

from sagellm_protocol.checks import at_least
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["KVExportRequest", "KVImported", "KVTicket"]


class KVExportRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Ask for the blocks of the beginning of `token_ids`, as far as they are in the prefix cache."""

    token_ids: tuple[int, ...]
    adapter: str | None = None
    cache_salt: str = ""


class KVTicket(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that lie ready to be read.

    Attributes:
        name: of the file, a plain name; both engines know the directory.
        fingerprint: of model, weights and cache format; blocks mean nothing to an engine with another one.
        block_size: tokens a block.
        block_bytes: bytes a block.
        token_ids: the tokens of all blocks, `block_size` each.
        checksums: CRC-32 of each block.
        adapter, cache_salt: what the blocks' names depend on.
    """

    name: str
    fingerprint: str
    block_size: int
    block_bytes: int
    token_ids: tuple[int, ...]
    checksums: tuple[int, ...]
    adapter: str | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        at_least("block_size", self.block_size, 1)
        at_least("block_bytes", self.block_bytes, 1)
        if len(self.token_ids) != self.block_size * len(self.checksums):
            raise InvalidArgumentError(
                f"the ticket has {len(self.token_ids)} tokens and {len(self.checksums)} checksums for blocks of {self.block_size}",
                param="token_ids",
            )

    @property
    def total_bytes(self) -> int:
        """Bytes of the file."""
        return self.block_bytes * len(self.checksums)


class KVImported(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a ticket: blocks taken over, blocks that were there already, and the seconds it took."""

    stored: int
    present: int
    seconds: float
