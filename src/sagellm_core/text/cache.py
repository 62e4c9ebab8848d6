"""Converted tokenizers on disk, keyed by the content they were made of: the second start converts nothing.

One file an entry: ``magic | u32 length of the info | SHA-256 of the rest | info (JSON), padded | the encoder's document``. Files are
published by rename, so two processes may convert the same model at once; a file that is not whole is made again. The document of an
entry that was found is a view of the mapped file: what is not looked at takes no memory.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from sagellm_core.text.tokenizer import TokenizerInfo

__all__ = ["cached_tokenizer", "default_cache_dir"]

_VERSION = 8
_MAGIC = b"SGTK" + bytes([_VERSION])
_HEAD = struct.Struct("<I32s")
_START = 64
_CHUNK = 1 << 20


def default_cache_dir() -> Path:
    """``$SAGELLM_HOME/tokenizers``, else in ``$XDG_CACHE_HOME/isagellm``, else in ``~/.cache/isagellm``."""
    home = os.environ.get("SAGELLM_HOME")
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(home) if home else (Path(cache) if cache else Path.home() / ".cache") / "isagellm"
    return root / "tokenizers"


def cached_tokenizer(
    content: list[bytes], convert: Callable[[], tuple[TokenizerInfo, bytes]], cache_dir: Path | None = None
) -> tuple[TokenizerInfo, bytes | memoryview]:
    """Return what `convert` made of `content` before, or call it and keep the result where that is possible."""
    digest = hashlib.sha256(_MAGIC)
    for part in content:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    path = (cache_dir or default_cache_dir()) / f"{digest.hexdigest()[:32]}.tok"
    found = _read(path)
    if found is not None:
        return found
    info, document = convert()
    _write(path, info, document)
    return info, document


def _read(path: Path) -> tuple[TokenizerInfo, memoryview] | None:
    try:
        with path.open("rb") as file:
            head = file.read(_START)
            if len(head) < _START or not head.startswith(_MAGIC):
                return None
            length, digest = _HEAD.unpack_from(head, len(_MAGIC))
            if _digest(file) != digest:
                return None
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError:
        return None
    try:
        info = msgspec.json.decode(data[_START : _START + length], type=TokenizerInfo)
    except msgspec.DecodeError:
        return None
    return info, data[_aligned(_START + length) :]


def _digest(file: BinaryIO) -> bytes:
    """SHA-256 from here to the end; read, not mapped, so that nothing of it stays resident."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.digest()


def _aligned(position: int) -> int:
    return -(-position // 64) * 64


def _write(path: Path, info: TokenizerInfo, document: bytes) -> None:
    body = msgspec.json.encode(info)
    rest = body.ljust(_aligned(_START + len(body)) - _START) + document
    head = (_MAGIC + _HEAD.pack(len(body), hashlib.sha256(rest).digest())).ljust(_START, b"\0")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tok-")
    except OSError:
        return  # a read-only home costs a conversion a start, nothing else
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(head)
            file.write(rest)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
