"""Who listens on a port of this machine: proc_net_tcp(5) knows the users, proc_pid_fd(5) the processes. Empty where there is no /proc."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

__all__ = ["Listener", "listeners"]

_LISTENING = "0A"


class Listener(NamedTuple):
    """A listening socket: its user's id, and the process that has it open, 0 and empty where this user may not know."""

    uid: int
    pid: int
    command: str


def listeners(port: int) -> list[Listener]:
    """Return the sockets that listen on `port`, on any address."""
    tables = [table for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if table.is_file()]
    rows = [line.split() for table in tables for line in table.read_text(encoding="ascii").splitlines()[1:]]
    there = [row for row in rows if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port]
    return [Listener(int(row[7]), *_process(f"socket:[{row[9]}]")) for row in there]


def _process(socket: str) -> tuple[int, str]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(str(fd.readlink()) == socket for fd in (folder / "fd").iterdir()):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                return int(folder.name), " ".join(words).strip()
    return 0, ""
