"""A child process whose end can be awaited on any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

__all__ = ["Child", "describe_exit", "execute"]


def execute(
    argv: Sequence[str], *, log_fd: int, pass_fds: Sequence[int], environ: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own; what it writes goes to `log_fd`; `environ` is added to ours.

    Raises:
        OSError: it cannot be executed.
    """
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        pass_fds=list(pass_fds),
        start_new_session=True,
        env={**os.environ, **(environ or {})},
    )


class Child:
    """A process in a session of its own, so that a Ctrl-C in our terminal is not also its own.

    Its end is seen through a pidfd where the kernel has them, else by a thread that waits. It is reaped there and nowhere else, so
    that its number cannot belong to another process while a signal may still be sent.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._ended: asyncio.Future[int] = self._watch()

    @classmethod
    def spawn(
        cls, argv: Sequence[str], *, log_fd: int, pass_fds: Sequence[int], environ: Mapping[str, str] | None = None
    ) -> Child:
        """Start `argv` as `execute` does. Needs a running event loop.

        Raises:
            OSError: it cannot be executed.
        """
        return cls(execute(argv, log_fd=log_fd, pass_fds=pass_fds, environ=environ))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended.done()

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end and return the exit status.

        Raises:
            asyncio.TimeoutError: it still runs after `timeout_s`.
        """
        return await asyncio.wait_for(asyncio.shield(self._ended), timeout_s)

    def _watch(self) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            return asyncio.ensure_future(asyncio.to_thread(self._process.wait))
        ended: asyncio.Future[int] = loop.create_future()

        def readable() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            self._kill_group()
            ended.set_result(self._process.wait())

        loop.add_reader(fd, readable)
        return ended

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def dump(self) -> None:
        """Ask it to write the stacks of its threads and end (SIGABRT)."""
        self._signal(signal.SIGABRT)

    def kill(self) -> None:
        """End it, and all that it started, at once."""
        if not self._ended.done():
            self._kill_group()

    def _signal(self, number: int) -> None:
        if not self._ended.done():
            os.kill(self.pid, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def describe_exit(returncode: int | None) -> str:
    """Return an exit status in words; None is one that nobody knows."""
    if returncode is None:
        return "ended"
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was ended by {name}"
