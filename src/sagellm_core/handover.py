"""KV blocks out to shared memory and in from it, a few at a time between two steps, so that no step waits long."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import stat
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from sagellm_core.engine import Engine
from sagellm_protocol.errors import InvalidArgumentError, KVTransferError
from sagellm_protocol.handover import KVExportRequest, KVImported, KVTicket
from sagellm_protocol.prefix import block_hashes, root_hash

__all__ = ["Handover", "shared_directory"]

_CHUNK_BYTES = 8 << 20
_NAME = re.compile(r"kv-(\d+)-[0-9a-f]{16}")

_T = TypeVar("_T")


def shared_directory() -> Path:
    """Return the directory of this user's hand-over files, in shared memory where the system has it; made with mode 0700.

    Raises:
        KVTransferError: it cannot be made, or belongs to somebody else.
    """
    shm = Path("/dev/shm")  # noqa: S108 (shared memory is the point; the directory below is ours alone)
    base = shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
    directory = base / f"isagellm-{os.getuid()}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as exc:
        raise KVTransferError(f"the directory for KV hand-over cannot be made: {exc.strerror}") from None
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise KVTransferError("the directory for KV hand-over is not this user's alone: remove it")
    return directory


class BetweenSteps(Protocol):
    """Runs a function on the engine's thread, when no step is running."""

    def __call__(self, function: Callable[[], _T], /) -> Awaitable[_T]:
        """Return what `function` returns."""
        ...


class Handover:
    """Export and import for one engine.

    Args:
        engine: touched only inside `between_steps`.
        between_steps: runs a function on the engine's thread.
        directory: where the files lie.
    """

    def __init__(
        self,
        engine: Engine,
        between_steps: BetweenSteps,
        directory: Callable[[], Path] = shared_directory,
    ) -> None:
        self._engine = engine
        self._between_steps = between_steps
        self._directory = directory
        self._given_out: set[str] = set()
        description = engine.describe()
        self._block_size = description.block_size
        self._block_bytes = description.block_bytes
        self._fingerprint = "/".join(
            str(part)
            for part in (
                description.model,
                description.architecture,
                description.backend,
                description.quantization,
                description.vocab_size,
                description.weight_bytes,
                description.block_bytes,
            )
        )

    async def export(self, request: KVExportRequest) -> KVTicket:
        """Write what the cache has of a prompt's beginning; the file stays until it is imported or discarded.

        Raises:
            KVTransferError: nothing of it is cached, or shared memory is full.
        """
        names = block_hashes(
            request.token_ids, block_size=self._block_size, adapter=request.adapter, salt=request.cache_salt
        )
        path = self._directory() / f"kv-{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            checksums = await self._write(fd, names)
        except OSError as exc:
            path.unlink(missing_ok=True)
            raise KVTransferError(f"KV blocks cannot be written to shared memory: {exc.strerror}") from None
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        if not checksums:
            path.unlink(missing_ok=True)
            raise KVTransferError("the prefix cache holds no full block of this prompt: run its prefill here first")
        self._given_out.add(path.name)
        return KVTicket(
            name=path.name,
            fingerprint=self._fingerprint,
            block_size=self._block_size,
            block_bytes=self._block_bytes,
            token_ids=request.token_ids[: len(checksums) * self._block_size],
            checksums=tuple(checksums),
            adapter=request.adapter,
            cache_salt=request.cache_salt,
        )

    async def _write(self, fd: int, names: list[bytes]) -> list[int]:
        checksums: list[int] = []
        chunk = max(1, _CHUNK_BYTES // self._block_bytes)
        for start in range(0, len(names), chunk):
            wanted = names[start : start + chunk]
            data = await self._between_steps(partial(self._engine.copy_out, wanted))
            checksums += await asyncio.to_thread(self._put, fd, data, start * self._block_bytes)
            if len(data) < len(wanted) * self._block_bytes:
                break
        return checksums

    def _put(self, fd: int, data: bytes, offset: int) -> list[int]:
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
        return [zlib.crc32(view[at : at + self._block_bytes]) for at in range(0, len(view), self._block_bytes)]

    async def import_(self, ticket: KVTicket) -> KVImported:
        """Take the blocks of a ticket into the cache and remove the file.

        Raises:
            KVTransferError: the blocks are another model's, incomplete or damaged; none that is damaged is taken.
        """
        began = time.perf_counter()
        if ticket.fingerprint != self._fingerprint or ticket.block_size != self._block_size:
            raise KVTransferError(f"the blocks are of {ticket.fingerprint}, this engine's are of {self._fingerprint}")
        path = self._path(ticket.name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise KVTransferError(f"the blocks {ticket.name} cannot be read: {exc.strerror}") from None
        try:
            stored, present = await self._read(fd, ticket)
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)
        return KVImported(stored=stored, present=present, seconds=time.perf_counter() - began)

    async def _read(self, fd: int, ticket: KVTicket) -> tuple[int, int]:
        size = os.fstat(fd).st_size
        if size != ticket.total_bytes:
            raise KVTransferError(f"the blocks {ticket.name} have {size} bytes, the ticket says {ticket.total_bytes}")
        names = block_hashes(
            ticket.token_ids, block_size=self._block_size, adapter=ticket.adapter, salt=ticket.cache_salt
        )
        parents = [root_hash(ticket.adapter, ticket.cache_salt), *names]
        stored = present = 0
        chunk = max(1, _CHUNK_BYTES // self._block_bytes)
        for start in range(0, len(names), chunk):
            end = min(start + chunk, len(names))
            data = await asyncio.to_thread(self._get, fd, ticket, start, end)
            entries = [
                (names[i], parents[i], ticket.token_ids[i * self._block_size : (i + 1) * self._block_size])
                for i in range(start, end)
            ]
            new, old = await self._between_steps(partial(self._engine.copy_in, entries, data))
            stored, present = stored + new, present + old
            if new + old < end - start:
                break
        return stored, present

    def _get(self, fd: int, ticket: KVTicket, start: int, end: int) -> bytes:
        size = self._block_bytes
        data = os.pread(fd, (end - start) * size, start * size)
        for i in range(start, end):
            block = data[(i - start) * size : (i - start + 1) * size]
            if zlib.crc32(block) != ticket.checksums[i]:
                raise KVTransferError(f"block {i} of {ticket.name} is damaged: its checksum differs")
        return data

    def discard(self, name: str) -> bool:
        """Remove a file that nobody will import; False if it is gone."""
        self._given_out.discard(name)
        path = self._path(name)
        if not path.exists():
            return False
        path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Remove what was given out and never fetched, and what engines left behind that have died."""
        for name in list(self._given_out):
            self.discard(name)
        for path in self._directory().iterdir():
            match = _NAME.fullmatch(path.name)
            if match and not Path("/proc", match[1]).exists() and Path("/proc/self").exists():
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidArgumentError(f"{name[:60]!r} is not the name of a KV hand-over file", param="name")
        return self._directory() / name
