"""Frames from several threads onto one socket."""

import asyncio
import contextlib
import socket
import threading

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_core.frame_writer import FrameWriter
from sagellm_protocol import wire


@contextlib.contextmanager
def writing(limit: int = 1 << 26):
    """A writer, the socket that reads from it, and an event that is set when too much waits."""
    ours, theirs = socket.socketpair()
    overflow = asyncio.Event()
    ours.setblocking(False)
    theirs.setblocking(False)
    writer = FrameWriter(asyncio.get_running_loop(), ours.fileno(), limit, overflow.set)
    try:
        yield writer, theirs, overflow
    finally:
        writer.close()
        writer.close()
        ours.close()
        theirs.close()


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 300_000), min_size=1, max_size=12), min_size=1, max_size=4))
async def test_frames_arrive_whole_and_in_order(sizes):
    """Whatever several threads send, and however late it is read, each frame arrives whole, and those of a thread in their order."""

    def send(name: int) -> None:
        for number, size in enumerate(sizes[name]):
            payload = bytes([name, number]) + b"x" * size
            writer.send(len(payload).to_bytes(4, "big") + payload)

    with writing() as (writer, reader, _):
        threads = [threading.Thread(target=send, args=(name,)) for name in range(len(sizes))]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        drained = asyncio.Event()
        writer.when_drained(drained.set)
        seen, decoder = [], wire.FrameDecoder()
        while len(seen) < sum(map(len, sizes)):
            seen += decoder.feed(await asyncio.get_running_loop().sock_recv(reader, 1 << 20))
        await drained.wait()
    for name, mine in enumerate(sizes):
        assert [(frame[1], len(frame) - 2) for frame in seen if frame[0] == name] == list(enumerate(mine))


async def test_too_much_is_told_once_and_nothing_more_is_kept():
    """A peer that does not read costs no more than the limit."""
    with writing(limit=1 << 20) as (writer, _, overflow):
        while not writer.closed:
            writer.send(b"x" * 100_000)
        await overflow.wait()
        assert writer.backlog <= 1 << 20
        writer.send(b"x")


async def test_a_peer_that_has_gone_closes_the_writer():
    """Writing to nobody raises nothing, and who waits for the rest is told at once."""
    with writing() as (writer, reader, _):
        reader.close()
        while not writer.closed:
            writer.send(b"x" * 1000)
        drained = []
        writer.when_drained(lambda: drained.append(True))
        assert drained
