"""The HTTP client of the data path: bodies however they arrive, kept connections, and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane.live.foreign_wire import StreamReader
from sagellm_control_plane.live.http1 import Http1Client, HttpBrokenError, HttpRefusedError
from sagellm_control_plane.live.http1_body import body_framing
from sagellm_protocol.errors import EngineDiedError


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Return `data` in pieces that end at `places` (modulo its length)."""
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    starts = [0, *ends[:-1]]
    return [data[a:b] for a, b in zip(starts, ends, strict=True)]


places = st.lists(st.integers(0, 10_000), max_size=12)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), places, st.sampled_from(["", ";x=1"]), st.booleans())
def test_a_chunked_body_is_the_same_however_it_arrives(chunks, where, extension, trailer):
    """Whatever the cuts, extensions and trailers, the body is the chunks joined, and its end is seen with its last byte only."""
    data = b"".join(f"{len(c):x}{extension}\r\n".encode() + c + b"\r\n" for c in chunks)
    data += b"0\r\n" + (b"x: y\r\n" if trailer else b"") + b"\r\n"
    reader = body_framing(200, {"transfer-encoding": "chunked"})()
    out = b""
    pieces = cut(data, where)
    for number, piece in enumerate(pieces):
        assert not reader.complete or not b"".join(pieces[number:])
        out += reader.take(piece)
    assert out == b"".join(chunks)
    assert reader.complete
    assert reader.clean


@given(st.binary(max_size=80), st.binary(max_size=5), places)
def test_a_counted_body_ends_where_its_length_says(body, more, where):
    """Bytes beyond the length are not body, and spoil the connection."""
    reader = body_framing(200, {"content-length": str(len(body))})()
    out = b"".join(reader.take(piece) for piece in cut(body + more, where))
    assert out == body
    assert reader.complete


@pytest.mark.parametrize("line", [b"xyz\r\n", b"-5\r\n", b"\r\n", b"1" * 70_000])
def test_a_chunk_without_a_length_is_refused(line):
    """What is no length ends the body as broken, also when it never ends."""
    reader = body_framing(200, {"transfer-encoding": "chunked"})()
    with pytest.raises(HttpBrokenError):
        reader.take(line)


EVENTS = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b': comment\n\ndata: {"choices":[{"delta":{"content":"one [DONE] "}}]}\r\n\r\n'
    b'event: message\ndata: {"choices":[{"delta":{"content":"two"}}]}\n\n'
    b'data: {"choices":[{"delta":{"reasoning":"hm"}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"\xc3\xa4"},"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\ndata: [DONE]\n\n'
)


@given(places)
def test_events_are_the_same_however_they_arrive(where):
    """Cut anywhere, also inside a character, a stream gives the same text, reasoning, end and usage."""
    reader = StreamReader("r", chat=True)
    deltas = [delta for piece in cut(EVENTS, where) for delta in reader.take(piece)]
    assert "".join(d.text or "" for d in deltas) == "one [DONE] two\u00e4"
    assert [d.reasoning for d in deltas if d.reasoning] == ["hm"]
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage.completion_tokens == 4
    assert sum(d.text_tokens for d in deltas) == 3
    assert reader.end() is None


def test_an_event_that_is_no_json_is_the_engines_fault():
    """Bytes that are no event of this format fail the attempt, so that it goes on elsewhere."""
    with pytest.raises(EngineDiedError):
        StreamReader("r", chat=True).take(b"data: {nonsense\n\n")


@asynccontextmanager
async def listening(handle):
    ended = []

    async def whole(reader, writer):
        ended.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await handle(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listener = await asyncio.start_server(whole, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    client = Http1Client(f"http://127.0.0.1:{port}", {})
    try:
        yield client
    finally:
        await client.close()
        listener.close()
        await listener.wait_closed()
        await asyncio.gather(*ended)


def serving(*answers: bytes):
    """A handler that gives one answer for each request on a connection and then closes it; counts connections."""
    connections = []

    async def handle(reader, writer):
        connections.append(writer)
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

    return handle, connections


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def test_a_connection_is_kept_for_the_next_request():
    """Two requests after each other share a connection; one that the server asked to close is not used again."""
    handle, connections = serving(WHOLE, b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
    async with listening(handle) as client:
        first, second = await client.request("GET", "/a"), await client.request("GET", "/b")
        assert (first.content, second.content, len(connections)) == (b"ok", b"no", 1)
        assert (await client.request("GET", "/c")).content == b"ok"
        assert len(connections) == 2


async def test_a_kept_connection_that_the_server_closed_is_no_failure():
    """The server ends idle connections: the next request goes over a new one, and nobody notices."""
    handle, connections = serving(WHOLE)
    async with listening(handle) as client:
        for _ in range(3):
            assert (await client.request("GET", "/")).content == b"ok"
        assert len(connections) == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SMTP ready\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    ],
)
async def test_an_answer_that_breaks_off_is_an_error(answer):
    """No answer, another protocol, a body cut short, a length that is none, an endless head: each is broken, none hangs."""
    handle, _connections = serving(answer)
    async with listening(handle) as client:
        with pytest.raises(HttpBrokenError):
            await asyncio.wait_for(client.request("GET", "/"), 5)


async def test_an_answer_without_a_length_ends_with_its_connection():
    """HTTP/1.0 servers mark the end by closing; 100 Continue before the answer is skipped."""
    handle, _connections = serving(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\nall of it")
    async with listening(handle) as client:
        assert (await client.request("POST", "/", b"{}")).content == b"all of it"


async def test_nobody_there_is_a_refusal():
    """A port without a listener is an error that says that nothing was sent."""
    async with listening(serving()[0]) as client:
        pass
    with pytest.raises(HttpRefusedError):
        await client.request("GET", "/")


async def test_cancelling_closes_the_connection():
    """Whoever gives up on a request ends its connection, at which servers abort; the client goes on with a new one."""
    gone, asked = asyncio.Event(), asyncio.Event()

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsome")
        assert await reader.read() == b""
        gone.set()

    async with listening(handle) as client:
        task = asyncio.create_task(client.request("GET", "/"))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gone.wait(), 5)
