"""A disk tier for KV blocks that are evicted: lossless, checked, and never above its cap.

All blocks lie in one file of fixed slots that has no name (it is unlinked as soon as it is open), so nothing is left behind
by a crash. The index is in memory: the tier lives as long as its engine.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from sagellm_backend.base import KVSpace
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["DiskTier"]


@dataclass(frozen=True, slots=True)
class _Entry:
    slot: int
    token_ids: tuple[int, ...]
    checksum: int


class DiskTier:
    """Blocks on disk by name, the least recently used one goes first.

    Args:
        kv: the device's cache, source and destination of the bytes.
        directory: made if it is missing.
        max_bytes: cap of the file.

    Raises:
        InvalidArgumentError: not even one block fits under the cap.
        OSError: the directory cannot be written to.
    """

    def __init__(self, kv: KVSpace, directory: str | Path, max_bytes: int) -> None:
        self._n_slots = max_bytes // kv.block_bytes
        if self._n_slots < 1:
            raise InvalidArgumentError(
                f"spill_bytes is {max_bytes}, one KV block has {kv.block_bytes} bytes: pass at least that",
                param="spill_bytes",
            )
        self._kv = kv
        self._size = kv.block_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._free: list[int] = []
        self._high = 0
        self.errors = 0
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory, prefix="sagellm-kv-", buffering=0)  # noqa: SIM115  close() does

    @property
    def n_blocks(self) -> int:
        """Blocks on disk."""
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return self._high * self._size

    def store(self, name: bytes, token_ids: tuple[int, ...], block: int) -> None:
        """Keep a copy of `block`; on a full disk it is dropped and counted in `errors`."""
        if name in self._entries:
            self._entries.move_to_end(name)
            return
        data = self._kv.export_blocks([block])
        slot = self._slot()
        try:
            written = os.pwrite(self._file.fileno(), data, slot * self._size)
        except OSError:
            written = 0
        if written == self._size:
            self._entries[name] = _Entry(slot, token_ids, zlib.crc32(data))
        else:
            self._free.append(slot)
            self.errors += 1

    def holds(self, name: bytes, token_ids: tuple[int, ...]) -> bool:
        """Whether a block of that name and those tokens is there."""
        entry = self._entries.get(name)
        return entry is not None and entry.token_ids == token_ids

    def load(self, name: bytes, block: int) -> bool:
        """Fill `block`; False if the copy is gone, short or damaged (it is then forgotten and counted in `errors`)."""
        entry = self._entries.get(name)
        if entry is None:
            return False
        try:
            data = os.pread(self._file.fileno(), self._size, entry.slot * self._size)
        except OSError:
            data = b""
        if len(data) != self._size or zlib.crc32(data) != entry.checksum:
            self.errors += 1
            self._free.append(self._entries.pop(name).slot)
            return False
        self._entries.move_to_end(name)
        self._kv.import_blocks([block], data)
        return True

    def close(self) -> None:
        """Give the disk space back. Idempotent."""
        self._entries.clear()
        self._file.close()

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        if self._high < self._n_slots:
            self._high += 1
            return self._high - 1
        return self._entries.popitem(last=False)[1].slot
