"""Converted tokenizers on disk, keyed by the content they were made of: the second start converts nothing.

One file an entry: ``magic | u32 length of the info | u32 crc of the rest | info (JSON) | tokenizer.json``. Files are published by
rename, so two processes may convert the same model at once; a file that is not whole is made again.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from sagellm_core.text.tokenizer import TokenizerInfo

__all__ = ["cached_tokenizer", "default_cache_dir"]

_VERSION = 7
_MAGIC = b"SGTK" + bytes([_VERSION])
_HEAD = struct.Struct("<II")


def default_cache_dir() -> Path:
    """``$SAGELLM_HOME/tokenizers``, else in ``$XDG_CACHE_HOME/isagellm``, else in ``~/.cache/isagellm``."""
    home = os.environ.get("SAGELLM_HOME")
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(home) if home else (Path(cache) if cache else Path.home() / ".cache") / "isagellm"
    return root / "tokenizers"


def cached_tokenizer(
    content: list[bytes], convert: Callable[[], tuple[TokenizerInfo, bytes]], cache_dir: Path | None = None
) -> tuple[TokenizerInfo, bytes]:
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


def _read(path: Path) -> tuple[TokenizerInfo, bytes] | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _HEAD.size
    if len(data) < start or not data.startswith(_MAGIC):
        return None
    length, crc = _HEAD.unpack_from(data, len(_MAGIC))
    body = memoryview(data)[start:]
    if zlib.crc32(body) != crc or length > len(body):
        return None
    try:
        return msgspec.json.decode(body[:length], type=TokenizerInfo), bytes(body[length:])
    except msgspec.DecodeError:
        return None


def _write(path: Path, info: TokenizerInfo, document: bytes) -> None:
    body = msgspec.json.encode(info)
    data = _MAGIC + _HEAD.pack(len(body), zlib.crc32(document, zlib.crc32(body))) + body + document
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tok-")
    except OSError:
        return  # a read-only home costs a conversion a start, nothing else
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
