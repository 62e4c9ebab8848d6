"""multipart/form-data (RFC 7578), for bodies that are in memory and bounded."""

from __future__ import annotations

import re
from typing import NamedTuple

from sagellm_gateway.errors import HttpError

__all__ = ["Part", "parse"]

_BOUNDARY = re.compile(rb'boundary=(?:"([^"\r\n]{1,200})"|([^;,\s"]{1,200}))', re.I)
_NAME = re.compile(rb'[;\s]name="((?:[^"\\\r\n]|\\.){0,256})"')
_FILENAME = re.compile(rb'[;\s]filename="((?:[^"\\\r\n]|\\.){0,1024})"')
_MAX_PARTS = 64


class Part(NamedTuple):
    """One field; `filename` is None for plain values."""

    name: str
    filename: str | None
    content: bytes


def parse(content_type: bytes, body: bytes) -> list[Part]:
    """Return the fields of a form.

    Raises:
        HttpError: 415 not such a form, 400 malformed or too many fields.
    """
    if not content_type.lower().startswith(b"multipart/form-data"):
        raise HttpError(415, "send the file as multipart/form-data", code="unsupported_media_type")
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise HttpError(400, "the form has no boundary", code="invalid_form")
    mark = b"--" + (match[1] or match[2])
    pieces = (b"\r\n" + body).split(b"\r\n" + mark)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise HttpError(400, "the form is not closed by its boundary", code="invalid_form")
    if len(pieces) - 2 > _MAX_PARTS:
        raise HttpError(400, f"the form has more than {_MAX_PARTS} fields", code="invalid_form")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> Part:
    head, separator, content = piece.partition(b"\r\n\r\n")
    name = _NAME.search(head)
    if not separator or name is None or len(head) > 8192:
        raise HttpError(400, "a field of the form has no name, or its head is malformed", code="invalid_form")
    filename = _FILENAME.search(head)
    return Part(_text(name[1]), None if filename is None else _text(filename[1]), content)


def _text(raw: bytes) -> str:
    try:
        return raw.replace(b'\\"', b'"').decode()
    except UnicodeDecodeError:
        raise HttpError(400, "a name in the form is not UTF-8", code="invalid_form") from None
