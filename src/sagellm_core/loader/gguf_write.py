"""Writes GGUF files, version 3: for tests and for requantised copies."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm_core.loader.gguf import GGML_BLOCKS

if TYPE_CHECKING:
    from sagellm_backend.tensors import Tensor

__all__ = ["Value", "write_gguf"]

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]

_ALIGNMENT = 32
_TYPE_OF_FORMAT = {name: number for number, (name, _, _) in GGML_BLOCKS.items()}


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> None:
    """Write a file.

    Args:
        path: overwritten.
        metadata: key -> value; whole numbers become the smallest of uint32, int32, uint64, int64 that holds them (in arrays of
            int32 and int64), other numbers float32.
        tensors: name -> tensor.
    """
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), _typed(value)]
    offset = 0
    for name, tensor in tensors.items():
        dims = tuple(reversed(tensor.shape))
        kind = _TYPE_OF_FORMAT[tensor.format.name]
        head += [_text(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)]
        offset += _padded(tensor.data.size)
    header = b"".join(head)
    with path.open("wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for tensor in tensors.values():
            file.write(tensor.data.tobytes().ljust(_padded(tensor.data.size), b"\0"))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    if isinstance(value, str) or not isinstance(value, Sequence):
        kind = _kind([value], unsigned=True)
        return struct.pack("<I", kind) + _bare(kind, value)
    kind = _kind(value, unsigned=False)  # other readers want arrays of whole numbers signed, single ones unsigned
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_bare(kind, item) for item in value)


def _kind(values: Sequence[bool | int | float | str], *, unsigned: bool) -> int:
    if any(isinstance(v, str) for v in values):
        return 8
    if values and all(isinstance(v, bool) for v in values):
        return 7
    if any(isinstance(v, float) for v in values):
        return 6
    low, high = min(values, default=0), max(values, default=0)
    assert isinstance(low, int)
    assert isinstance(high, int)
    if low < 0 or not unsigned:
        return 5 if low >= -(1 << 31) and high < 1 << 31 else 11
    return 4 if high < 1 << 32 else 10


def _bare(kind: int, value: bool | int | float | str) -> bytes:
    if isinstance(value, str):
        return _text(value)
    return struct.pack("<" + {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}[kind], value)
