"""The wire between the control plane and an engine process: frames and messages, no I/O.

A frame is a length (4 bytes, big-endian) and that many bytes of msgpack. The first frame of each side is `Hello` (client) and
`Welcome` (engine). After that the client sends `Submit`, `Abort` and `Call`; the engine sends `Deltas` (all tokens of one step in one
frame), `Reply`, `Failure` and, every `Welcome.heartbeat_s` seconds, `Heartbeat`. Either side ends with `Goodbye`.

What is asked seldom goes through `Call` and `Reply`: a method's name and its typed parameters (`METHODS`). A new method is a row of that
table; an engine that lacks it answers with `not_implemented`, and `Welcome.methods` says so beforehand.

Both sides treat the other's bytes as hostile: sizes are bounded, types are checked, nothing is unpickled.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from sagellm_protocol.embedding import EmbedRequest, EmbedResult
from sagellm_protocol.engine import EngineDescription, EngineRequest, EngineStatus, TokenDelta
from sagellm_protocol.errors import Error, InvalidArgumentError, UnsupportedError
from sagellm_protocol.handover import KVExportRequest, KVImported, KVTicket
from sagellm_protocol.prefix import BlockEvent, BlockSnapshot

__all__ = [
    "HELLO_BYTES",
    "MAX_FRAME_BYTES",
    "METHODS",
    "WIRE_VERSION",
    "Abort",
    "AbortParams",
    "BlockEventsParams",
    "Call",
    "Cancel",
    "Deltas",
    "DiscardKVParams",
    "DrainParams",
    "Failure",
    "FrameDecoder",
    "FromEngine",
    "Goodbye",
    "Heartbeat",
    "Hello",
    "LoadAdapterParams",
    "Method",
    "NoParams",
    "Reply",
    "StartReport",
    "Submit",
    "ToEngine",
    "UnloadAdapterParams",
    "Welcome",
    "call",
    "decode_from_engine",
    "decode_params",
    "decode_result",
    "decode_to_engine",
    "encode_frame",
    "reply",
]

WIRE_VERSION = 1

MAX_FRAME_BYTES = 32 * 2**20
"""Largest frame; a prompt of four million tokens fits."""

HELLO_BYTES = 4096
"""Largest frame that an engine reads from a peer that has not said who it is."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", omit_defaults=True):
    """The client's first frame. `token` is required over TCP; `engine_id` is whom the client wants to reach, if it minds."""

    version: int = WIRE_VERSION
    token: str = ""
    engine_id: str = ""


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The engine's first frame: it is ready."""

    version: int = WIRE_VERSION
    description: EngineDescription
    methods: tuple[str, ...]
    heartbeat_s: float


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Run a sequence; its tokens come in `Deltas`, a refusal in `Failure`.

    `stream` is the client's own number, never used twice on a connection: what is still under way for an aborted stream cannot be taken
    for a later stream's, even if that has the same request id.
    """

    stream: int
    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Drop a stream of this connection; there is no answer, and what still comes for it is to be ignored."""

    stream: int


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """Ask for one of `METHODS`; `call_id` is the client's own number."""

    call_id: int
    method: str
    params: msgspec.Raw


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Nobody waits for the answer to a call any more: stop working on it."""

    call_id: int


class Deltas(msgspec.Struct, frozen=True, kw_only=True, tag="deltas"):
    """What the streams of this connection gained, with their numbers."""

    deltas: tuple[tuple[int, TokenDelta], ...]


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply", omit_defaults=True):
    """The answer to a `Call`: `result`, or `error`."""

    call_id: int
    result: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: Error | None = None


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """The engine lives; ``status.steps`` is its progress counter."""

    status: EngineStatus


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure", omit_defaults=True):
    """A stream failed; without a number, the connection did, and it ends."""

    error: Error
    stream: int | None = None


class Goodbye(msgspec.Struct, frozen=True, kw_only=True, tag="goodbye"):
    """The last frame of a side that leaves on purpose."""

    reason: str


ToEngine: TypeAlias = Hello | Submit | Abort | Call | Cancel | Goodbye
FromEngine: TypeAlias = Welcome | Deltas | Reply | Heartbeat | Failure | Goodbye


class NoParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For a method that takes none."""


class AbortParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``abort``: drop a sequence, whoever submitted it; the result says whether it was held."""

    request_id: str


class DrainParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``drain``: refuse new sequences, and end when the last one has finished, after `timeout_s` seconds at most."""

    timeout_s: float


class BlockEventsParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``block_events``: the changes of the prefix cache with `seq` above `after`."""

    after: int


class DiscardKVParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``discard_kv``: the `name` of a ticket; the result says whether it was still there."""

    name: str


class LoadAdapterParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``load_adapter``: the LoRA adapter in the directory `path` (of the engine's machine), usable as `name` from then on."""

    name: str
    path: str


class UnloadAdapterParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of ``unload_adapter``: forget it; refused while sequences use it."""

    name: str


class Method(msgspec.Struct, frozen=True):
    """What a call takes and gives."""

    params: type[msgspec.Struct]
    result: Any


METHODS: dict[str, Method] = {
    "describe": Method(NoParams, EngineDescription),
    "status": Method(NoParams, EngineStatus),
    "abort": Method(AbortParams, bool),
    "drain": Method(DrainParams, None),
    "block_events": Method(BlockEventsParams, tuple[BlockEvent, ...]),
    "block_snapshot": Method(NoParams, BlockSnapshot),
    "embed": Method(EmbedRequest, EmbedResult),
    "load_adapter": Method(LoadAdapterParams, None),
    "unload_adapter": Method(UnloadAdapterParams, None),
    "export_kv": Method(KVExportRequest, KVTicket),
    "import_kv": Method(KVTicket, KVImported),
    "discard_kv": Method(DiscardKVParams, bool),
}
"""Every method by name."""


class StartReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a starting engine process tells the one that started it: one JSON line, `address` or `error`."""

    address: str = ""
    error: Error | None = None


_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """Return `message` as one frame.

    Raises:
        InvalidArgumentError: it is larger than `MAX_FRAME_BYTES`, or holds text that UTF-8 cannot.
    """
    try:
        payload = _ENCODER.encode(message)
    except (UnicodeEncodeError, OverflowError) as exc:
        raise InvalidArgumentError(f"message cannot be sent: {exc}") from None
    if len(payload) > MAX_FRAME_BYTES:
        raise InvalidArgumentError(
            f"message has {len(payload)} bytes, a frame holds {MAX_FRAME_BYTES}: send less at once"
        )
    return len(payload).to_bytes(4, "big") + payload


def decode_to_engine(payload: bytes | memoryview) -> ToEngine:
    """Return what a client sent.

    Raises:
        InvalidArgumentError: malformed, unknown, or with a field out of range.
    """
    message: ToEngine = _guarded(_TO_ENGINE, payload)
    return message


def decode_from_engine(payload: bytes | memoryview) -> FromEngine:
    """Return what an engine sent; raises like `decode_to_engine`."""
    message: FromEngine = _guarded(_FROM_ENGINE, payload)
    return message


def call(call_id: int, method: str, params: msgspec.Struct) -> Call:
    """Return the message that calls `method`."""
    return Call(call_id=call_id, method=method, params=msgspec.Raw(_ENCODER.encode(params)))


def decode_params(message: Call) -> Any:
    """Return the parameters of a call, of the type that its method takes.

    Raises:
        UnsupportedError: no such method.
        InvalidArgumentError: the parameters are not the method's.
    """
    method = METHODS.get(message.method)
    if method is None:
        raise UnsupportedError(f"method {message.method[:60]!r} is unknown to this engine: upgrade it", param="method")
    return _guarded(msgspec.msgpack.Decoder(method.params), message.params)


def reply(call_id: int, result: object) -> Reply:
    """Return the message that answers call `call_id`."""
    return Reply(call_id=call_id, result=msgspec.Raw(_ENCODER.encode(result)))


def decode_result(method: str, message: Reply) -> Any:
    """Return the result of a call to `method`.

    Raises:
        InvalidArgumentError: it is not of the type that the method gives.
    """
    return _guarded(msgspec.msgpack.Decoder(METHODS[method].result), message.result)


def _guarded(decoder: Any, payload: Any) -> Any:
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as exc:
        raise InvalidArgumentError(f"message on the wire is malformed: {exc}") from None
    except (UnicodeDecodeError, RecursionError, OverflowError, ValueError) as exc:
        raise InvalidArgumentError(f"message on the wire is malformed: {type(exc).__name__}") from None


class FrameDecoder:
    """Cuts a byte stream into frames, however it arrives. Holds at most one frame and what came with it.

    `limit` may be raised while it runs: an engine reads no large frame before it knows its peer.
    """

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Return the payloads that `data` completed.

        Raises:
            InvalidArgumentError: a frame announces more than `limit` bytes; the stream cannot be read on.
        """
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        start, end = 0, len(buffer)
        while end - start >= 4:
            size = int.from_bytes(buffer[start : start + 4], "big")
            if size > self.limit:
                raise InvalidArgumentError(f"peer announces a frame of {size} bytes, the limit is {self.limit}")
            if end - start - 4 < size:
                break
            frames.append(bytes(buffer[start + 4 : start + 4 + size]))
            start += 4 + size
        del buffer[:start]
        return frames

    @property
    def partial(self) -> int:
        """Bytes of a frame that is not complete: > 0 at the end of a stream means that it was cut."""
        return len(self._buffer)
