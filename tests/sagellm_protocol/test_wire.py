import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_protocol import EngineRequest, EngineStatus, SamplingParams, TokenDelta, wire
from sagellm_protocol.errors import Error, ErrorCode, InvalidArgumentError, UnsupportedError

REQUEST = EngineRequest(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(seed=1, max_tokens=3))


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 20), min_size=1, max_size=200))
def test_frames_survive_any_chunking(payloads, sizes):
    """The frames that come out are those that went in, however the stream is cut."""
    stream = b"".join(len(p).to_bytes(4, "big") + p for p in payloads)
    decoder, seen, at, turn = wire.FrameDecoder(), [], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        seen += decoder.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert seen == payloads
    assert decoder.partial == 0


def test_partial_frame_is_seen():
    """A stream that ends inside a frame can be told from one that ends between two."""
    decoder = wire.FrameDecoder()
    assert decoder.feed(wire.encode_frame(wire.Goodbye(reason="x"))[:-1]) == []
    assert decoder.partial > 0


def test_huge_length_is_refused_at_once():
    """A frame that announces more than the limit is refused before a byte of it is stored."""
    with pytest.raises(InvalidArgumentError, match="4294967295 bytes"):
        wire.FrameDecoder().feed(b"\xff\xff\xff\xff")


def test_http_is_refused():
    """A browser that connects is refused by its first four bytes."""
    with pytest.raises(InvalidArgumentError, match="limit is 4096"):
        wire.FrameDecoder(wire.HELLO_BYTES).feed(b"GET / HTTP/1.1\r\n\r\n")


TO_ENGINE = [
    wire.Hello(token="t", engine_id="e"),
    wire.Submit(stream=1, request=REQUEST),
    wire.Abort(stream=1),
    wire.call(7, "abort", wire.AbortParams(request_id="r")),
    wire.Cancel(call_id=7),
    wire.Goodbye(reason="done"),
]
FROM_ENGINE = [
    wire.Deltas(deltas=((1, TokenDelta(request_id="r", token_ids=(5,), finish_reason="stop")),)),
    wire.reply(7, True),
    wire.Reply(call_id=1, error=Error(code=ErrorCode.INTERNAL, message="m")),
    wire.Heartbeat(status=EngineStatus(engine_id="e", steps=4)),
    wire.Failure(error=Error(code=ErrorCode.UNAVAILABLE, message="m"), stream=1),
    wire.Goodbye(reason="done"),
]


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda m: type(m).__name__)
def test_messages_to_the_engine(message):
    """Every message of a client comes back equal."""
    (payload,) = wire.FrameDecoder().feed(wire.encode_frame(message))
    assert wire.decode_to_engine(payload) == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda m: type(m).__name__)
def test_messages_from_the_engine(message):
    """Every message of an engine comes back equal."""
    (payload,) = wire.FrameDecoder().feed(wire.encode_frame(message))
    assert wire.decode_from_engine(payload) == message


def test_directions_are_kept():
    """An engine does not take a message that only engines send."""
    payload = wire.encode_frame(wire.Heartbeat(status=EngineStatus(engine_id="e")))[4:]
    with pytest.raises(InvalidArgumentError, match="malformed"):
        wire.decode_to_engine(payload)


@given(st.binary(max_size=100))
def test_garbage_is_refused(payload):
    """Random payloads raise an error of our tree, or happen to be a message."""
    for decode in (wire.decode_to_engine, wire.decode_from_engine):
        with contextlib.suppress(InvalidArgumentError):
            decode(payload)


@given(st.data())
def test_flipped_bytes_never_escape_the_tree(data):
    """A corrupted message decodes or raises an error of our tree."""
    raw = bytearray(wire.encode_frame(data.draw(st.sampled_from(TO_ENGINE)))[4:])
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidArgumentError):
        message = wire.decode_to_engine(raw)
        if isinstance(message, wire.Call):
            wire.decode_params(message)


def test_ranges_are_checked_on_the_wire():
    """A temperature out of range does not cross the wire."""
    payload = msgspec.msgpack.encode(
        {
            "type": "submit",
            "stream": 1,
            "request": {"request_id": "r", "prompt_token_ids": [1], "sampling": {"temperature": 9}},
        }
    )
    with pytest.raises(InvalidArgumentError, match="temperature is 9"):
        wire.decode_to_engine(payload)


def test_unknown_method():
    """A method that this version lacks is refused by name, not as a broken stream."""
    message = wire.decode_to_engine(wire.encode_frame(wire.call(1, "fly", wire.NoParams()))[4:])
    with pytest.raises(UnsupportedError, match="'fly' is unknown"):
        wire.decode_params(message)


def test_parameters_and_results_are_typed():
    """Parameters and results of a call are checked against the method's row."""
    good = wire.call(1, "drain", wire.DrainParams(timeout_s=2.0))
    assert wire.decode_params(good) == wire.DrainParams(timeout_s=2.0)
    with pytest.raises(InvalidArgumentError, match="timeout_s"):
        wire.decode_params(wire.call(1, "drain", wire.NoParams()))
    with pytest.raises(InvalidArgumentError, match="Expected `bool`"):
        wire.decode_result("abort", wire.reply(1, "yes"))


def test_oversize_message(monkeypatch):
    """A message that no frame holds is refused by the sender, with both numbers."""
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 8)
    with pytest.raises(InvalidArgumentError, match="a frame holds 8"):
        wire.encode_frame(wire.Goodbye(reason="x" * 20))
