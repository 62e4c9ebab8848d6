"""Packed weights on disk: packed once, mapped by every later start, shared by all engines of the machine.

A file is found by what it was made from (the model file's identity or content, the layout and its version), written under
another name and renamed, and checked as a whole before it is used. The packed layout is the same for every instruction set.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sagellm_backend.cpu import _native
from sagellm_backend.cpu.layout import Layout
from sagellm_backend.tensors import Weights

__all__ = ["MAX_CACHE_BYTES", "Arena", "anonymous_arena", "cached_arena", "fingerprint"]

Arena = npt.NDArray[np.uint8]

LAYOUT_VERSION = 1
"""Raised when the packed formats change."""

MAX_CACHE_BYTES = 16 << 30
"""Of all files in a cache folder together; the longest unused go first."""

_SUFFIX = ".weights"
_HEAD_BYTES = 4096
_HEAD = struct.Struct("<8s32sQQ")
_MAGIC = b"SGLMWT01"


def fingerprint(weights: Weights) -> bytes:
    """What the weights are: the files' identity (``weights.identity``) where the loader gives one, else all their bytes."""
    identity = getattr(weights, "identity", "")
    digest = hashlib.blake2b(identity.encode(), digest_size=32)
    if not identity:
        for slot in sorted(weights):
            digest.update(slot.encode())
            digest.update(np.ascontiguousarray(weights[slot].data).data)
    return digest.digest()


def anonymous_arena(nbytes: int) -> Arena:
    """Page-aligned zeros, on huge pages where the kernel has them."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def cached_arena(folder: Path, layout: Layout, weights: Weights, pack: Callable[[Arena], None]) -> Arena:
    """Return the packed weights, mapped from `folder`; pack and keep them first if they are not there or damaged.

    A folder that cannot be written, or a disk without room, costs the repacking and nothing else.
    """
    key = hashlib.blake2b(repr((LAYOUT_VERSION, layout)).encode() + fingerprint(weights), digest_size=32).digest()
    path = folder / f"{key.hex()[:40]}{_SUFFIX}"
    found = _read(path, key, layout.nbytes)
    if found is not None:
        return found
    if layout.nbytes + _HEAD_BYTES <= MAX_CACHE_BYTES:
        try:
            arena = _write(path, key, layout.nbytes, pack)
        except OSError:
            pass  # full or read-only: work without
        else:
            _trim(folder, keep=path)
            return arena
    arena = anonymous_arena(layout.nbytes)
    pack(arena)
    return arena


def _read(path: Path, key: bytes, nbytes: int) -> Arena | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != _HEAD_BYTES + nbytes:
                return None
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError:
        return None
    magic, stored_key, stored_bytes, checksum = _HEAD.unpack_from(memory)
    arena: Arena = np.frombuffer(memory, np.uint8)[_HEAD_BYTES:]
    if (magic, stored_key, stored_bytes) != (_MAGIC, key, nbytes) or _native.checksum(arena) != checksum:
        return None
    with suppress(OSError):  # a shared, read-only cache: then its owner decides what goes
        os.utime(path)
    return arena


def _write(path: Path, key: bytes, nbytes: int, pack: Callable[[Arena], None]) -> Arena:
    """Pack into a file beside `path`, then give it that name: readers see all of it or nothing.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".packing-")
    try:
        os.posix_fallocate(handle, 0, _HEAD_BYTES + nbytes)  # a full disk must fail here, not as a fault while packing
        memory = mmap.mmap(handle, _HEAD_BYTES + nbytes, flags=mmap.MAP_SHARED)
        arena: Arena = np.frombuffer(memory, np.uint8)[_HEAD_BYTES:]
        pack(arena)
        _HEAD.pack_into(memory, 0, _MAGIC, key, nbytes, _native.checksum(arena))
        memory.flush()
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    arena.flags.writeable = False
    return arena


def _trim(folder: Path, keep: Path) -> None:
    """Remove the longest unused files until the folder is within its bound; engines that map them keep them until they end."""
    files: list[tuple[float, int, Path]] = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MAX_CACHE_BYTES:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size
