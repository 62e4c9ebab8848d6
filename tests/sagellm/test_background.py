"""The loop behind the blocking client: Ctrl-C, cancelling and closing, wherever they land."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from sagellm import background, streams
from sagellm.background import BackgroundLoop
from sagellm.results import Delta
from sagellm.streams import DeltaStream
from sagellm_protocol.errors import CancelledRequestError, UnavailableError

_OURS = {background.__file__, streams.__file__}
_WAIT_S = 10.0


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    it = BackgroundLoop()
    yield it
    it.close()


class Source:
    """A stream of deltas that says when it has ended; after `count` of them it waits for ever."""

    def __init__(self, count: int, then: Callable[[], None] = lambda: None) -> None:
        self.count = count
        self.then = then
        self.waiting = threading.Event()
        self.ended = threading.Event()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        try:
            for _ in range(self.count):
                await asyncio.sleep(0)
                yield Delta({"choices": []})
            self.waiting.set()
            self.then()
            await asyncio.Event().wait()
        finally:
            self.ended.set()


def opcodes(work: Callable[[], None], interrupt_at: int = 0) -> int:
    """Return how many instructions of ours `work` runs in this thread; raise KeyboardInterrupt before one of them."""
    seen = 0

    def step(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal seen
        seen += event == "opcode"
        if event == "opcode" and seen == interrupt_at:
            raise KeyboardInterrupt
        return step

    def enter(frame: FrameType, _event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename not in _OURS:
            return None
        frame.f_trace_opcodes = True
        return step

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = (
        True  # Python 3.12 and 3.13 tell of instructions only if a frame asks before tracing begins
    )
    sys.settrace(enter)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # the one that was about to be handed over
def test_an_interrupt_before_any_instruction_ends_the_stream_and_nothing_else(loop: BackgroundLoop) -> None:
    """Wherever KeyboardInterrupt lands in the waiting thread, the stream ends, what it holds is let go, and the loop serves on."""
    source = Source(2)

    def read() -> None:
        with DeltaStream(source.deltas(), loop) as stream:
            assert len([next(stream), next(stream)]) == 2

    async def still_there() -> str:
        return "yes"

    instructions = opcodes(read)
    assert instructions > 100
    for at in range(1, instructions + 1):
        source = Source(2)
        try:
            opcodes(read, at)
        except KeyboardInterrupt:
            pass  # its traceback held the stream: an interrupt in the middle of closing leaves that to the collector
        else:
            pytest.fail(f"nothing was interrupted at instruction {at}")
        assert loop.call(still_there()) == "yes"
        began = source.waiting.is_set() or loop.call(_others_running()) or source.ended.is_set()
        assert not began or source.ended.wait(_WAIT_S), f"interrupted at instruction {at}: the stream goes on"


async def _others_running() -> bool:
    return len(asyncio.all_tasks()) > 2  # this one, and the one that waits for the end


def test_a_signal_while_waiting_ends_the_stream(loop: BackgroundLoop) -> None:
    """SIGINT while the thread waits for the next delta raises KeyboardInterrupt there, and the request is aborted."""
    source = Source(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stream = DeltaStream(source.deltas(), loop)
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        signal.signal(signal.SIGINT, before)
    assert source.ended.wait(_WAIT_S)
    assert list(stream) == []


def test_a_signal_handler_may_cancel(loop: BackgroundLoop) -> None:
    """`cancel_calls` in a signal handler ends the step that is waited for with CancelledRequestError, and the stream with it."""
    source = Source(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, lambda *_: loop.cancel_calls())
    try:
        with DeltaStream(source.deltas(), loop) as stream, pytest.raises(CancelledRequestError):
            list(stream)
    finally:
        signal.signal(signal.SIGINT, before)
    assert source.ended.is_set()


def test_another_thread_may_close_a_stream(loop: BackgroundLoop) -> None:
    """A stream that is closed elsewhere simply ends for the one who iterates."""
    source = Source(1)
    stream = DeltaStream(source.deltas(), loop)

    def close() -> None:
        assert source.waiting.wait(_WAIT_S)
        stream.close()

    thread = threading.Thread(target=close)
    thread.start()
    assert len(list(stream)) == 1
    thread.join()
    assert source.ended.is_set()


def test_closing_the_loop_frees_who_waits(loop: BackgroundLoop) -> None:
    """Closing cancels what is under way: each waiting thread gets UnavailableError, a later call too, a later close nothing."""
    sources = [Source(0) for _ in range(8)]
    raised: list[BaseException] = []

    def wait(source: Source) -> None:
        stream = DeltaStream(source.deltas(), loop)
        try:
            next(stream)
        except UnavailableError as error:
            raised.append(error)
        stream.close()

    threads = [threading.Thread(target=wait, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    assert all(source.waiting.wait(_WAIT_S) for source in sources)
    loop.close()
    loop.close()
    for thread in threads:
        thread.join(_WAIT_S)
    assert len(raised) == len(sources)
    with pytest.raises(UnavailableError, match="closed"):
        loop.call(_others_running())


def test_calls_and_a_close_at_the_same_time_never_hang() -> None:
    """Threads that call while the loop is being closed get a result or UnavailableError, each of them."""

    async def nothing() -> int:
        return 1

    for _ in range(20):
        it, outcomes, go = BackgroundLoop(), list[int](), threading.Event()

        def call(it: BackgroundLoop = it, outcomes: list[int] = outcomes, go: threading.Event = go) -> None:
            go.wait()
            for _ in range(50):
                try:
                    outcomes.append(it.call(nothing()))
                except UnavailableError:
                    outcomes.append(0)

        threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        go.set()
        it.close()
        for thread in threads:
            thread.join(_WAIT_S)
        assert len(outcomes) == 200
