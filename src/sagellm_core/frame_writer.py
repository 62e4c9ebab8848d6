"""Whole frames onto a non-blocking socket, from any thread."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable

__all__ = ["FrameWriter"]


class FrameWriter:
    """Writes a frame where it is called; what the socket does not take at once is written by the event loop, in order.

    A transport can be written to on its loop's thread only. An engine that had to wake that thread for each step would wait for
    it to get the interpreter lock, and the step's tokens would leave while the next step computes.

    Args:
        loop: of the connection. All methods but `send` are called on it.
        fileno: of the connected socket, which stays its owner's.
        limit: bytes that may wait.
        overflow: called on the loop when they would be more; the frame is dropped then, and all that follow.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fileno: int, limit: int, overflow: Callable[[], None]) -> None:
        self._loop = loop
        self._limit = limit
        self._overflow = overflow
        self._lock = threading.Lock()
        self._socket = socket.socket(fileno=os.dup(fileno))
        self._socket.setblocking(False)
        self._backlog = bytearray()
        self._closed = False
        self._drained: Callable[[], None] | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._closed

    @property
    def backlog(self) -> int:
        """Bytes that wait for the peer to read."""
        return len(self._backlog)

    def send(self, frame: bytes) -> None:
        """Write `frame`, or keep it until the peer reads; nothing once the writer is closed. Never blocks."""
        with self._lock:
            if self._closed:
                return
            if self._backlog:
                if len(self._backlog) + len(frame) > self._limit:
                    self._closed = True
                    self._loop.call_soon_threadsafe(self._overflow)
                else:
                    self._backlog += frame
                return
            taken = self._write(frame)
            if taken < len(frame) and not self._closed:
                self._backlog += frame[taken:]
                self._loop.call_soon_threadsafe(self._watch)

    def when_drained(self, then: Callable[[], None]) -> None:
        """Call `then` once all that was sent is written, or cannot be any more; at once if nothing waits."""
        if self._backlog and not self._closed:
            self._drained = then
        else:
            then()

    def close(self) -> None:
        """Write no more. Idempotent."""
        with self._lock:
            self._closed = True
            if self._socket.fileno() >= 0:
                self._loop.remove_writer(self._socket.fileno())
                self._socket.close()

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # the peer has gone: whoever reads from it sees that
            self._closed = True
            return 0

    def _watch(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._socket.fileno(), self._drain)

    def _drain(self) -> None:
        with self._lock:
            del self._backlog[: self._write(self._backlog)]
            if self._backlog and not self._closed:
                return
            self._loop.remove_writer(self._socket.fileno())
        if self._drained is not None:
            self._drained()
