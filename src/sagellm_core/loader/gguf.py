"""GGUF files (versions 2 and 3), read by ourselves: the header in milliseconds, the tensors as views of a mapped file.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A vocabulary is a string array whose end is known only by
walking it, so the reader first looks for the next key instead; `_Cursor.skip_strings` says why that is safe.
"""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, overload

from sagellm_core.loader.files import map_file
from sagellm_protocol.errors import ModelFileError

if TYPE_CHECKING:
    from sagellm_backend.tensors import Tensor

__all__ = ["GGML_BLOCKS", "GGUFArray", "GGUFHeader", "MetadataValue", "TensorInfo", "read_header"]

GGML_BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""ggml type number -> format name, weights a block, bytes a block: those that a backend executes."""

_FOREIGN_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {number: struct.Struct("<" + code) for number, code in _SCALARS.items()}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MAX_NAME = 4096
_MAX_DIMS = 4
_MIN_KV_BYTES, _MIN_TENSOR_BYTES = 13, 32
_NEXT_KEYS = tuple(b"\0\0\0\0\0\0\0" + prefix for prefix in (b"tokenizer.", b"general."))
_GUESS_FROM = 1024  # shorter arrays are walked
_GUESS_WINDOW = 1 << 20

Scalar = int | float | bool | str
Element = int | float | str


class GGUFArray(Sequence[Element]):
    """An array of the metadata, parsed when it is first used; keeps the file mapped."""

    __slots__ = ("_buffer", "_count", "_end", "_items", "_name", "_start", "_type")

    def __init__(self, name: str, buffer: mmap.mmap, kind: int, count: int, start: int, end: int) -> None:
        self._name, self._buffer, self._type, self._count = name, buffer, kind, count
        self._start, self._end = start, end
        self._items: Sequence[Element] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the elements are strings."""
        return self._type == _STRING

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Element: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Element]: ...
    def __getitem__(self, index: int | slice) -> Element | Sequence[Element]:
        return self._load()[index]

    def __iter__(self) -> Iterator[Element]:
        return iter(self._load())

    def strings(self) -> list[str]:
        """Return the elements as text.

        Raises:
            ModelFileError: they are numbers, or malformed.
        """
        if not self.is_text:
            raise ModelFileError(f"metadata {self._name} holds numbers where text is expected: the file is malformed")
        return [str(item) for item in self._load()]

    def numbers(self) -> list[int | float]:
        """Return the elements as numbers.

        Raises:
            ModelFileError: they are text.
        """
        if self.is_text:
            raise ModelFileError(f"metadata {self._name} holds text where numbers are expected: the file is malformed")
        return [item for item in self._load() if not isinstance(item, str)]

    def _load(self) -> Sequence[Element]:
        if self._items is None:
            self._items = self._parse_strings() if self.is_text else self._parse_numbers()
        return self._items

    def _parse_numbers(self) -> Sequence[Element]:
        data = self._buffer[self._start : self._end]
        if self._type == 7:
            return [byte != 0 for byte in data]
        out: array[float] = array(_SCALARS[self._type], data)
        if sys.byteorder == "big":
            out.byteswap()
        return out

    def _parse_strings(self) -> list[Element]:
        data = self._buffer[self._start : self._end]
        out: list[Element] = []
        read, position, size = _U64.unpack_from, 0, len(data)
        try:
            for _ in range(self._count):
                begin = position + 8
                position = begin + read(data, position)[0]
                if position > size:
                    break
                out.append(data[begin:position].decode())
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise self._malformed() from error
        if position != size:
            raise self._malformed()
        return out

    def _malformed(self) -> ModelFileError:
        return ModelFileError(f"metadata {self._name}: its strings are malformed; fetch the file again")


MetadataValue = Scalar | GGUFArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` row-major, `format` a name of `Format`, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """All of a file but the weights themselves.

    Attributes:
        metadata: key -> number, text or lazily parsed array.
        tensors: name -> place; checked against the file's size.
        metadata_span: (first, last + 1) byte of the metadata, for hashing.
    """

    path: Path
    version: int
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]
    file_bytes: int
    metadata_span: tuple[int, int]
    buffer: mmap.mmap = field(repr=False)

    def tensor(self, name: str) -> Tensor:
        """Return a view of a tensor's bytes (imports numpy). The file stays mapped as long as the view lives.

        Raises:
            KeyError: no tensor of that name.
        """
        import numpy as np

        from sagellm_backend.tensors import Format, Tensor

        info = self.tensors[name]
        data = np.frombuffer(self.buffer, np.uint8, info.nbytes, info.offset)
        return Tensor(info.shape, Format[info.format], data)

    def vector(self, name: str) -> tuple[float, ...]:
        """Return a short F32 vector as numbers, without numpy.

        Raises:
            KeyError: no tensor of that name.
            ModelFileError: it is of another format or shape.
        """
        info = self.tensors[name]
        if info.format != "F32" or len(info.shape) != 1 or info.shape[0] > 1 << 16:
            raise ModelFileError(f"tensor {name!r} is {info.format} of shape {info.shape}, not a short F32 vector")
        values = array("f", self.buffer[info.offset : info.offset + info.nbytes])
        if sys.byteorder == "big":
            values.byteswap()
        return tuple(values)

    def metadata_bytes(self) -> bytes:
        """Return the metadata as it lies in the file."""
        return self.buffer[self.metadata_span[0] : self.metadata_span[1]]


def read_header(path: str | Path) -> GGUFHeader:
    """Map a GGUF file and parse its header.

    Raises:
        ModelFileError: missing, not a GGUF file, another version, truncated or malformed.
    """
    file = Path(path)
    buffer = map_file(file, least=24)
    n_tensors, n_pairs, version = _preamble(file, buffer)
    try:
        return _parse(file, buffer, version, n_tensors, n_pairs, guess=True)
    except ModelFileError:
        # A guess was wrong or the file is: walking every string tells.
        return _parse(file, buffer, version, n_tensors, n_pairs, guess=False)


def _preamble(path: Path, buffer: mmap.mmap) -> tuple[int, int, int]:
    if buffer[:4] != b"GGUF":
        raise ModelFileError(f"{path.name} is not a GGUF file: it begins with {buffer[:4]!r}, not with b'GGUF'")
    version = _U32.unpack_from(buffer, 4)[0]
    if version not in (2, 3):
        hint = "a big-endian file" if version >> 24 in (1, 2, 3) and not version & 0xFFFFFF else f"version {version}"
        raise ModelFileError(
            f"{path.name} is GGUF of {hint}; versions 2 and 3, little-endian, are read: convert it again"
        )
    n_tensors, n_pairs = struct.unpack_from("<QQ", buffer, 8)
    if n_tensors * _MIN_TENSOR_BYTES + n_pairs * _MIN_KV_BYTES > len(buffer):
        raise ModelFileError(
            f"{path.name} claims {n_tensors} tensors and {n_pairs} metadata keys in {len(buffer)} bytes: "
            "it is truncated or malformed; fetch it again"
        )
    return n_tensors, n_pairs, version


def _parse(path: Path, buffer: mmap.mmap, version: int, n_tensors: int, n_pairs: int, *, guess: bool) -> GGUFHeader:
    cursor = _Cursor(path.name, buffer, 24, guess)
    metadata: dict[str, MetadataValue] = {}
    for _ in range(n_pairs):
        key = cursor.text(_MAX_NAME, "a metadata key")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} stands twice")
        metadata[key] = cursor.value(key)
    span = (24, cursor.position)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8 or alignment > 1 << 20:
        raise cursor.error(f"general.alignment is {alignment!r}, not a multiple of 8")
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name!r} stands twice")
        tensors[info.name] = _place(cursor, info, start, alignment)
    return GGUFHeader(path, version, metadata, tensors, len(buffer), span, buffer)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.text(_MAX_NAME, "a tensor name")
    n_dims = cursor.u32()
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.error(f"tensor {name!r} has {n_dims} dimensions")
    dims = [cursor.u64() for _ in range(n_dims)]
    kind, offset = cursor.u32(), cursor.u64()
    if kind not in GGML_BLOCKS:
        known = ", ".join(entry[0] for entry in GGML_BLOCKS.values())
        raise cursor.error(f"tensor {name!r} is stored as {_FOREIGN_TYPES.get(kind, f'type {kind}')}; {known} are read")
    form, block, block_bytes = GGML_BLOCKS[kind]
    count = 1
    for dim in dims:
        count *= dim
    if count == 0 or count > 1 << 48:
        raise cursor.error(f"tensor {name!r} has the shape {dims}")
    if dims[0] % block:
        raise cursor.error(
            f"tensor {name!r} has rows of {dims[0]} weights, not a multiple of {form}'s block of {block}"
        )
    return TensorInfo(name, tuple(reversed(dims)), form, offset, count // block * block_bytes)


def _place(cursor: _Cursor, info: TensorInfo, start: int, alignment: int) -> TensorInfo:
    if info.offset % alignment:
        raise cursor.error(f"tensor {info.name!r} lies at offset {info.offset}, not a multiple of {alignment}")
    offset, size = start + info.offset, len(cursor.buffer)
    if offset + info.nbytes > size:
        raise cursor.error(
            f"tensor {info.name!r} ends at byte {offset + info.nbytes} of a file of {size} bytes; it was cut short"
        )
    return TensorInfo(info.name, info.shape, info.format, offset, info.nbytes)


class _Cursor:
    """A position in the mapped header; every read is checked against the file's end."""

    __slots__ = ("buffer", "guess", "name", "position", "size")

    def __init__(self, name: str, buffer: mmap.mmap, position: int, guess: bool) -> None:
        self.name, self.buffer, self.position, self.guess = name, buffer, position, guess
        self.size = len(buffer)

    def error(self, fact: str) -> ModelFileError:
        return ModelFileError(f"{self.name}: {fact}: fetch or convert the file again")

    def take(self, count: int, what: str) -> int:
        """Advance by `count` bytes; return where they begin."""
        start = self.position
        if count > self.size - start:
            raise self.error(f"{what} needs {count} bytes at byte {start} of a file of {self.size} bytes")
        self.position = start + count
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, "a number"))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, "a number"))[0])

    def text(self, limit: int, what: str) -> str:
        length = self.u64()
        if length > limit:
            raise self.error(f"{what} of {length} bytes at byte {self.position}")
        start = self.take(length, what)
        try:
            return self.buffer[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {start} is not UTF-8") from None

    def value(self, key: str) -> MetadataValue:
        kind = self.u32()
        if kind == _STRING:
            return self.text(self.size, f"metadata {key!r}")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _STRUCTS:
            raise self.error(f"metadata {key!r} has the unknown type {kind}")
        form = _STRUCTS[kind]
        value: Scalar = form.unpack_from(self.buffer, self.take(form.size, f"metadata {key!r}"))[0]
        return value

    def array(self, key: str) -> GGUFArray:
        kind, count = self.u32(), self.u64()
        start = self.position
        if kind == _STRING:
            self.skip_strings(key, count)
        elif kind in _STRUCTS:
            self.take(count * _STRUCTS[kind].size, f"the array {key!r} of {count} elements")
        else:
            raise self.error(f"metadata {key!r} is an array of the unsupported type {kind}")
        return GGUFArray(key, self.buffer, kind, count, start, self.position)

    def skip_strings(self, key: str, count: int) -> None:
        """Advance behind `count` strings.

        Walking 100,000 of them costs 15 ms, looking for the next key's prefix 0.2 ms. A wrong guess makes the rest of
        the header fail its checks (number of keys, tensors, offsets), upon which the header is parsed again without
        guessing; and an array checks, when it is used, that its strings end where it ends.
        """
        if count * 8 > self.size - self.position:
            raise self.error(f"the array {key!r} claims {count} strings at byte {self.position} of {self.size}")
        if self.guess and count >= _GUESS_FROM and (end := self._next_key(count)) is not None:
            self.position = end
            return
        read, buffer, position, size = _U64.unpack_from, self.buffer, self.position, self.size
        try:
            for _ in range(count):
                position += 8 + read(buffer, position)[0]
                if position > size:
                    break
        except struct.error:
            position = size + 1
        if position > size:
            raise self.error(f"the array {key!r} of {count} strings runs over the end of the file")
        self.position = position

    def _next_key(self, count: int) -> int | None:
        low = self.position + 8 * count
        limit = min(self.size, low + 64 * count)
        while low < limit:
            high = min(low + _GUESS_WINDOW, limit)
            found = [at for prefix in _NEXT_KEYS if (at := self.buffer.find(prefix, low, high)) > 0]
            if found:
                return min(found) - 1  # the length's lowest byte stands before its seven zeros
            low = high - 32
            if high == limit:
                break
        return None
