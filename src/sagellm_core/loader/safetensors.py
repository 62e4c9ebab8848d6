"""safetensors files and directories of shards, read by ourselves: a length, a JSON header, raw bytes. Nothing is unpickled.

Format: https://huggingface.co/docs/safetensors. A file is ``u64 header length | JSON | data``.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sagellm_core.loader.files import map_file
from sagellm_protocol.errors import ModelFileError

if TYPE_CHECKING:
    from sagellm_backend.tensors import Tensor

__all__ = ["SafetensorsFile", "StoredTensor", "load_json", "open_safetensors"]

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100_000_000
_MAX_DIMS = 8
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `offset` from the start of the file `buffer`."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int
    buffer: mmap.mmap = field(repr=False)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """One file, or all shards of a model, by tensor name."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    file_bytes: int

    def tensor(self, name: str) -> Tensor:
        """Return a view of a tensor's bytes (imports numpy). The file stays mapped as long as the view lives.

        Raises:
            KeyError: no tensor of that name.
            ModelFileError: its element type is not one of F32, F16, BF16.
        """
        import numpy as np

        from sagellm_backend.tensors import Format, Tensor

        info = self.tensors[name]
        if info.format not in _ITEM_BYTES:
            raise ModelFileError(f"tensor {name!r} is stored as {info.format}; F32, F16 and BF16 are read")
        data = np.frombuffer(info.buffer, np.uint8, info.nbytes, info.offset)
        return Tensor(info.shape, Format[info.format], data)


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Map a .safetensors file, or the shards of a directory.

    Raises:
        ModelFileError: missing, truncated or malformed.
    """
    place = Path(path)
    if not place.is_dir():
        return _merge(place, [place])
    index = place / _INDEX
    if index.is_file():
        return _merge(place, _shards(index))
    single = place / "model.safetensors"
    files = [single] if single.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise ModelFileError(f"{place} holds no .safetensors file: pass a model directory or a .gguf file")
    return _merge(place, files)


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model directory.

    Raises:
        ModelFileError: missing, unreadable, or no JSON object.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist: the model directory is incomplete") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"{path.name} is not a JSON object ({error}): fetch it again") from error


def _shards(index: Path) -> list[Path]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index.name} has no weight_map: fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelFileError(f"{index.name} names the shard {name!r}, which lies outside of the model directory")
    return [index.parent / name for name in names]


def _merge(path: Path, files: list[Path]) -> SafetensorsFile:
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    total = 0
    for file in files:
        buffer = map_file(file, least=8)
        total += len(buffer)
        header, start = _header(file, buffer)
        extra = header.pop("__metadata__", {})
        if isinstance(extra, dict):
            metadata.update({str(key): str(value) for key, value in extra.items()})
        for name, entry in header.items():
            if name in tensors:
                raise ModelFileError(f"tensor {name!r} stands in two shards of {path.name}: fetch them again")
            tensors[name] = _entry(file, buffer, start, name, entry)
    return SafetensorsFile(path, tensors, metadata, total)


def _header(file: Path, buffer: mmap.mmap) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(buffer[:8], "little")
    if length > min(len(buffer) - 8, _MAX_HEADER):
        raise ModelFileError(
            f"{file.name} claims a header of {length} bytes in a file of {len(buffer)}: "
            "it is truncated or no safetensors file; fetch it again"
        )
    try:
        return msgspec.json.decode(buffer[8 : 8 + length], type=dict[str, Any]), 8 + length
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(f"{file.name}: the header is not a JSON object ({error}): fetch it again") from error


def _entry(file: Path, buffer: mmap.mmap, start: int, name: str, entry: Any) -> StoredTensor:
    try:
        stored = msgspec.convert(entry, _Entry)
    except msgspec.ValidationError as error:
        raise ModelFileError(f"{file.name}: tensor {name!r} is malformed ({error}): fetch the file again") from None
    begin, end = stored.data_offsets
    item = _ITEM_BYTES.get(stored.dtype)
    size = len(buffer) - start
    if not 0 <= begin <= end <= size:
        raise ModelFileError(
            f"{file.name}: tensor {name!r} lies at bytes {begin} to {end} of {size}: the file was cut short; fetch it again"
        )
    if len(stored.shape) > _MAX_DIMS:
        raise ModelFileError(f"{file.name}: tensor {name!r} has {len(stored.shape)} dimensions: fetch the file again")
    if item is not None and (min(stored.shape, default=1) < 0 or prod(stored.shape) * item != end - begin):
        raise ModelFileError(
            f"{file.name}: tensor {name!r} of shape {list(stored.shape)} and type {stored.dtype} has {end - begin} bytes: "
            "fetch the file again"
        )
    return StoredTensor(name, stored.shape, stored.dtype, start + begin, end - begin, buffer)


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]
