"""Which process is which, and processes that somebody else started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from pathlib import Path

from sagellm_protocol.errors import UnavailableError

__all__ = ["AdoptedProcess", "identity", "is_alive", "make_private", "own_identity", "port_is_free", "visible_gpus"]

_POLL_S = 0.2


def identity(pid: int) -> str:
    """Return what tells a living process from any other that has or will have its number; empty if there is none.

    It is the boot, the number and the start time in clock ticks since that boot. Needs /proc: elsewhere it is always empty.
    """
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    fields = stat.rpartition(b")")[2].split()  # the name before it may hold anything
    if fields[0] in (b"Z", b"X"):
        return ""
    return f"{boot}:{pid}:{fields[19].decode()}"


def own_identity() -> str:
    """Return the identity of this process."""
    return identity(os.getpid())


def is_alive(known_identity: str) -> bool:
    """Whether the process of this identity lives."""
    parts = known_identity.split(":")
    return len(parts) == 3 and identity(int(parts[1])) == known_identity


def make_private(directory: Path) -> None:
    """Make a directory that only this user can look into, or check that it is one.

    Raises:
        UnavailableError: it cannot be made, or belongs to somebody else, who could then listen in the engines' place.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat(follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and found.st_mode & 0o022:
            directory.chmod(0o700)
    except OSError as exc:
        raise UnavailableError(f"cannot write to {directory}: {exc.strerror}: choose another directory") from None
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise UnavailableError(f"{directory} is not this user's own directory: remove it or choose another")


def port_is_free(port: str) -> bool:
    """Whether nobody listens on this port of the loopback interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except OSError:
            return False
    return True


def visible_gpus(root: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        return [str(index) for index in range(len(list(root.iterdir())))]
    except OSError:
        return []


class AdoptedProcess:
    """A process that is not our child; has the interface of `Child`, but its exit status stays unknown."""

    returncode: int | None = None

    def __init__(self, pid: int, known_identity: str) -> None:
        self.pid = pid
        self._identity = known_identity
        self._ended: asyncio.Future[None] = self._watch()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended.done()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait for its end.

        Raises:
            asyncio.TimeoutError: it still runs after `timeout_s`.
        """
        await asyncio.wait_for(asyncio.shield(self._ended), timeout_s)

    def _watch(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            return asyncio.ensure_future(self._poll())
        if not is_alive(self._identity):
            os.close(fd)
            return asyncio.ensure_future(self._poll())
        ended: asyncio.Future[None] = loop.create_future()

        def readable() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            ended.set_result(None)

        loop.add_reader(fd, readable)
        return ended

    async def _poll(self) -> None:
        while is_alive(self._identity):  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(_POLL_S)

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def dump(self) -> None:
        """Ask it to write the stacks of its threads and end (SIGABRT)."""
        self._signal(signal.SIGABRT)

    def kill(self) -> None:
        """End it, and all that it started, at once."""
        if is_alive(self._identity):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if is_alive(self._identity):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
