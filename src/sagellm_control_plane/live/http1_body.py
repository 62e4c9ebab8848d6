"""The body of an HTTP/1.1 message: counted, chunked, or until the connection ends. Bytes in, bytes out, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import repeat
from typing import Protocol

__all__ = ["BodyReader", "HttpBrokenError", "body_framing"]

MAX_TRAILER_BYTES = 64 * 1024


class HttpBrokenError(Exception):
    """The connection ended, or what came was no HTTP, after something may have been sent."""


class BodyReader(Protocol):
    """Takes the bytes after a head.

    Attributes:
        complete: the body has ended.
        clean: nothing came after it.
        until_close: only the end of the connection ends it.
    """

    complete: bool
    clean: bool
    until_close: bool

    def take(self, data: bytes) -> bytes:
        """Return what `data` adds to the body.

        Raises:
            HttpBrokenError: this is no body of its kind.
        """
        ...


def body_framing(status: int, headers: Mapping[str, str]) -> Callable[[], BodyReader]:
    """Return what makes the readers for replies with these headers (names in lower case).

    Raises:
        HttpBrokenError: the length is no number.
    """
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return _Chunked
    length = headers.get("content-length")
    if status in (204, 304):
        length = "0"
    return _UntilClose if length is None else partial(_Counted, _size(length.encode(), 10))


class _Counted:
    until_close = False

    def __init__(self, length: int) -> None:
        self._left = length
        self.complete = length == 0
        self.clean = True

    def take(self, data: bytes) -> bytes:
        piece = data[: self._left]
        self._left -= len(piece)
        self.complete = self._left == 0
        self.clean = len(piece) == len(data)
        return piece


class _UntilClose:
    complete = False
    clean = False
    until_close = True

    def take(self, data: bytes) -> bytes:
        return data


class _Chunked:
    """Returns what has arrived of all chunks at once: one piece for each arrival, not one for each token."""

    until_close = False

    def __init__(self) -> None:
        self.complete = False
        self.clean = True
        self._rest = b""  # of a line
        self._left = 0  # bytes of a chunk that are still to come, with its line end

    def take(self, data: bytes) -> bytes:
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not self._left and data.endswith(b"\r\n"):
            whole = self._whole(data)
            if whole is not None:
                return whole
        out: list[bytes] = []
        at, length = 0, len(data)
        if self._left:
            at = min(self._left, length)
            # The line end is the last two bytes of what is left.
            out.append(data[: max(min(at, self._left - 2), 0)])
            self._left -= at
        while at < length:
            end = data.find(b"\r\n", at)
            if end < 0:
                self._keep(data, at)
                break
            size = _size(data[at:end], 16)
            if size == 0:
                self._trailer(data, end)
                break
            at = end + 2
            stop = at + size
            out.append(data[at:stop])
            at = stop + 2
            if at > length:
                self._left = at - length
        return out[0] if len(out) == 1 else b"".join(out)

    def _whole(self, data: bytes) -> bytes | None:
        """Return the content of whole chunks without line ends in them, as servers of text send them; None if it is not that simple."""
        pieces = data.split(b"\r\n")
        complete = pieces[-3:] == _LAST
        del pieces[-3 if complete else -1 :]
        contents = pieces[1::2]
        try:
            if list(map(len, contents)) != list(map(int, pieces[::2], repeat(16))) or b"" in contents:
                return None
        except ValueError:
            return None
        self.complete = complete
        return b"".join(contents)

    def _trailer(self, data: bytes, at: int) -> None:
        """After the last chunk: header lines (skipped), and an empty one. `at` is the end of the line with the 0."""
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            self._keep(b"0" + data[at:], 0)
            return
        self.complete = True
        self.clean = end + 4 == len(data)

    def _keep(self, data: bytes, at: int) -> None:
        self._rest = data[at:]
        if len(self._rest) > MAX_TRAILER_BYTES:
            raise HttpBrokenError(f"a line of a chunked body is longer than {MAX_TRAILER_BYTES} bytes")


_LAST = [b"0", b"", b""]


def _size(text: bytes, base: int) -> int:
    try:
        value = int(text.partition(b";")[0] if b";" in text else text, base)
    except ValueError:
        value = -1
    if value < 0:
        raise HttpBrokenError(f"{text[:20]!r} is no length")
    return value
