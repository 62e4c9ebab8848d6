"""Versioned envelopes of the protocol types, in JSON and in msgpack.

An envelope is ``{"v": "0.1", "type": "Request", "body": {...}}``. Decoding builds typed structs from bytes and nothing else:
no pickle, no class names that are looked up, no code that runs. Whatever is wrong with the bytes becomes one of two errors:
`ProtocolVersionError` for a version that we do not speak, `InvalidArgumentError` for everything else.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from sagellm_protocol.errors import InvalidArgumentError, ProtocolVersionError
from sagellm_protocol.registry import ALIASES, TYPES

__all__ = ["MAX_BYTES", "PROTOCOL_VERSION", "decode", "encode", "from_json", "from_msgpack", "to_json", "to_msgpack"]

PROTOCOL_VERSION = "0.1"

MAX_BYTES = 64 * 2**20
"""Largest envelope that is decoded unless the caller says otherwise."""

Format = Literal["json", "msgpack"]
T = TypeVar("T", bound=msgspec.Struct)


class _Envelope(msgspec.Struct):
    v: str
    type: str
    body: msgspec.Raw


_CODECS: dict[str, tuple[Any, Any]] = {
    "json": (msgspec.json.Encoder(), msgspec.json.Decoder(_Envelope)),
    "msgpack": (msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_Envelope)),
}


def encode(value: msgspec.Struct, format: Format = "json") -> bytes:
    """Return `value` in an envelope.

    JSON has no infinities: a log-probability of -inf survives msgpack only.

    Raises:
        InvalidArgumentError: `value` is not a type of the protocol, or `format` is unknown.
    """
    encoder, _ = _codec(format)
    name = type(value).__name__
    if TYPES.get(name) is not type(value):
        raise InvalidArgumentError(f"{name} is not a type of protocol {PROTOCOL_VERSION}", param="type")
    try:
        body = msgspec.Raw(encoder.encode(value))
    except (TypeError, UnicodeEncodeError, OverflowError, RecursionError) as exc:
        raise InvalidArgumentError(f"{name} holds a value that {format} cannot carry: {exc}", param=name) from None
    encoded: bytes = encoder.encode(_Envelope(PROTOCOL_VERSION, name, body))
    return encoded


def decode(
    data: bytes | bytearray | memoryview, format: Format = "json", *, max_bytes: int = MAX_BYTES
) -> msgspec.Struct:
    """Return the struct that an envelope holds.

    Raises:
        ProtocolVersionError: the envelope has another version.
        InvalidArgumentError: too large, malformed, of an unknown type, or with a field missing or out of range.
    """
    _, decoder = _codec(format)
    if len(data) > max_bytes:
        raise InvalidArgumentError(f"envelope has {len(data)} bytes, the limit is {max_bytes}: send less at once")
    envelope: _Envelope = _guarded(decoder.decode, data, "envelope")
    if envelope.v != PROTOCOL_VERSION:
        raise ProtocolVersionError(
            f"envelope has protocol version {envelope.v[:20]!r}, this side speaks {PROTOCOL_VERSION}: upgrade the older side"
        )
    name = ALIASES.get(envelope.type, envelope.type)
    cls = TYPES.get(name)
    if cls is None:
        raise InvalidArgumentError(
            f"type {envelope.type[:60]!r} is unknown to protocol {PROTOCOL_VERSION}: see `sage-llm protocol schema`",
            param="type",
        )
    module = msgspec.json if format == "json" else msgspec.msgpack
    value: msgspec.Struct = _guarded(lambda body: module.decode(body, type=cls), envelope.body, name)
    return value


def to_json(value: msgspec.Struct) -> bytes:
    """Return `value` in a JSON envelope."""
    return encode(value, "json")


def to_msgpack(value: msgspec.Struct) -> bytes:
    """Return `value` in a msgpack envelope."""
    return encode(value, "msgpack")


def from_json(data: bytes, type: type[T]) -> T:
    """Return the `type` that a JSON envelope holds; raises as `decode` does, also for another type."""
    return _expect(decode(data, "json"), type)


def from_msgpack(data: bytes, type: type[T]) -> T:
    """Return the `type` that a msgpack envelope holds; raises as `decode` does, also for another type."""
    return _expect(decode(data, "msgpack"), type)


def _expect(value: msgspec.Struct, cls: type[T]) -> T:
    if not isinstance(value, cls):
        raise InvalidArgumentError(f"envelope holds a {type(value).__name__}, expected a {cls.__name__}", param="type")
    return value


def _codec(format: str) -> tuple[Any, Any]:
    if format not in _CODECS:
        raise InvalidArgumentError(f"format {format!r} is unknown: use json or msgpack", param="format")
    return _CODECS[format]


def _guarded(decode: Any, data: Any, what: str) -> Any:
    """Map every way in which bytes can be wrong to the one error; ranges are checked by the structs and pass through."""
    try:
        return decode(data)
    except msgspec.MsgspecError as exc:
        raise InvalidArgumentError(f"{what}: {exc}") from None
    except (UnicodeDecodeError, RecursionError, OverflowError, ValueError) as exc:
        raise InvalidArgumentError(f"{what} is malformed: {type(exc).__name__}") from None
