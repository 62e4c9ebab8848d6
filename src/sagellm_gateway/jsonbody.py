"""Untrusted bytes -> a typed struct, with every way to be malformed told apart in the error.

The checks on depth, duplicate keys and control characters are linear in the size of the body and run in C (`bytes.replace`,
`re`), so that 32 MB of brackets cost milliseconds and no recursion.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from sagellm_gateway.errors import HttpError
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["convert", "decode_object"]

T = TypeVar("T")

_STRING = re.compile(rb'"[^"]*(?:"|\Z)')
#: Escapes that may hide a colon or U+0000.
_SPELT = re.compile(rb"\\u00[03]")
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_decode = msgspec.json.Decoder(strict=True).decode
_encode = msgspec.json.Encoder().encode


def decode_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """Decode `body`, which must be one JSON object.

    Raises:
        HttpError: 400 with code ``invalid_json``; the message says what is wrong and, where known, at which byte.
    """
    if not body:
        raise _bad("the request has no body: send a JSON object")
    _check_depth(body, max_depth)
    try:
        value = _decode(body)
    except UnicodeDecodeError:
        raise _bad("the body is not UTF-8") from None
    except msgspec.ValidationError:
        raise _bad("the body holds a number that no double can hold") from None
    except msgspec.DecodeError as error:
        raise _bad(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _bad("the body must be a JSON object, it is of another type")
    again = _encode(value)
    if _SPELT.search(body):
        if b"\\u0000" in again.replace(b"\\\\", b""):
            raise _bad("the body holds U+0000 in a string: remove it")
        body, again = _outside_strings(body), _outside_strings(again)
    # Every member has one colon outside strings, and strings keep theirs: what is written again with fewer has lost a member.
    if body.count(b":") != again.count(b":"):
        raise _bad("the body has an object with the same key twice")
    return value


def convert(value: Any, type_: type[T]) -> T:
    """Turn decoded JSON into `type_`.

    Raises:
        InvalidArgumentError: a field is missing or of the wrong type; `param` is its path.
    """
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        match = _AT.match(str(error))
        what, path = (match["what"], match["path"]) if match else (str(error), None)
        param = path.lstrip(".") if path else None
        missing = re.search(r"missing required field `(\w+)`", what)
        if missing:
            param = f"{param}.{missing[1]}" if param else missing[1]
        raise InvalidArgumentError(f"{param}: {what}" if param else what, param=param) from None


def _outside_strings(text: bytes) -> bytes:
    """Return the JSON text without its strings: escapes go first, so that the pattern needs no backtracking."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    return _STRING.sub(b"", text)


def _check_depth(body: bytes, max_depth: int) -> None:
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    bare = _outside_strings(body)
    if bare.count(b"[") + bare.count(b"{") <= max_depth:
        return
    brackets = bare.translate(_BRACKETS, _NOT_BRACKETS)
    for _ in range(max_depth):
        if not brackets:
            return
        brackets = _peel(brackets)
    if brackets:
        raise _bad(f"the body is nested deeper than {max_depth} levels, or its brackets do not match")


def _peel(brackets: bytes) -> bytes:
    """Remove the innermost level: `replace` would otherwise join outer pairs only after their inside is gone."""
    return brackets.replace(b"[]", b"")


def _bad(message: str) -> HttpError:
    return HttpError(400, message, code="invalid_json")
