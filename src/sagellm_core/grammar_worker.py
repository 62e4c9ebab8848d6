"""A process in which a grammar is compiled before the engine does it: it has a memory limit, and it can be killed.

    python -m sagellm_core.grammar_worker LIMIT_BYTES

writes ``ready``, then reads one grammar a line (JSON text) and answers each with a line ``{"error": ..., "bytes": ...}``.
"""

from __future__ import annotations

import os
import resource
import select
import subprocess
import sys
import time
from typing import IO

import msgspec

__all__ = ["CheckWorker", "Verdict", "main"]

_MB = 1 << 20
_START_S = 60.0


class Verdict(msgspec.Struct, frozen=True):
    """What the worker found: an error or none, and the bytes by which compiling made it grow."""

    error: str | None = None
    bytes: int = 0


class CheckWorker:
    """One worker process, started on demand and started anew after it was killed. Used by one thread at a time."""

    def __init__(self, *, timeout_s: float, limit_bytes: int) -> None:
        self._timeout, self._limit = timeout_s, limit_bytes
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while none runs."""
        return self._process.pid if self._process is not None else None

    def check(self, grammar: str) -> Verdict:
        """Compile `grammar` there; a verdict comes within the timeout, whatever the grammar does."""
        line: bytes | None = b""
        process = self._running()
        if process is not None and process.stdin is not None and process.stdout is not None:
            try:
                process.stdin.write(msgspec.json.encode(grammar) + b"\n")
                process.stdin.flush()
                line = _read_line(process.stdout, self._timeout)
            except BrokenPipeError:
                line = b""
        if line is None:
            self.close()
            return Verdict(f"compiling it takes more than {self._timeout:g} s: simplify it")
        if not line.endswith(b"\n"):
            self.close()
            return Verdict(f"compiling it needs more than {self._limit // _MB} MB, or crashes: simplify it")
        return msgspec.json.decode(line, type=Verdict)

    def close(self) -> None:
        """Kill the worker, if one runs. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _running(self) -> subprocess.Popen[bytes] | None:
        """Return the worker, started if need be; None if it cannot start within its memory limit."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sagellm_core.grammar_worker", str(self._limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C in a terminal is for the engine: this ends with its standard input
            )
            # The time to start Python is not the grammar's.
            if self._process.stdout is None or not _read_line(self._process.stdout, _START_S):
                self.close()
        return self._process


def _read_line(stream: IO[bytes], seconds: float) -> bytes | None:
    """Read until a line ends or the stream does; None when the time is over."""
    deadline = time.monotonic() + seconds
    out = b""
    while not out.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return None
        data = os.read(stream.fileno(), 1 << 16)
        if not data:
            break
        out += data
    return out


def main(limit_bytes: int) -> None:
    """Serve standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from llguidance import LLMatcher

    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=str)
        before = _peak_bytes()
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        verdict = Verdict(messages[0] if failed else None, _peak_bytes() - before)
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
