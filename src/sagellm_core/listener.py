"""The socket of an engine process, and its ties to the process that started it."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from sagellm_protocol.errors import InvalidArgumentError, UnavailableError
from sagellm_protocol.wire import StartReport

__all__ = ["listen_tcp", "listen_unix", "send_report"]

_MAX_UNIX_PATH = 107


def listen_unix(path: Path) -> socket.socket:
    """Return a listening Unix socket that only this user can reach (mode 0600). A dead engine's socket is replaced.

    Raises:
        InvalidArgumentError: the path is too long, or something that is not a socket lies there.
        UnavailableError: a living process listens there, or the directory cannot be written.
    """
    size = len(os.fsencode(path))
    if size > _MAX_UNIX_PATH:
        raise InvalidArgumentError(
            f"the socket's path has {size} bytes, the kernel takes {_MAX_UNIX_PATH}: choose a shorter directory",
            param="socket",
        )
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(128)
    except OSError as exc:
        listener.close()
        raise UnavailableError(f"cannot listen on {path}: {exc.strerror}") from None
    finally:
        os.umask(old_mask)
    listener.setblocking(False)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise UnavailableError(f"cannot listen on {path}: {exc.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise InvalidArgumentError(f"{path} exists and is not a socket: choose another path", param="socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise UnavailableError(f"a process listens on {path} already: stop it, or choose another path")


def listen_tcp(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket; port 0 lets the system choose.

    Raises:
        UnavailableError: the port is taken or the host is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as exc:
        listener.close()
        cure = "choose another port" if exc.errno == errno.EADDRINUSE else "check host and port"
        raise UnavailableError(f"cannot listen on {host}:{port}: {exc.strerror}: {cure}") from None
    except OverflowError:
        listener.close()
        raise InvalidArgumentError(f"port is {port}: it must lie in [0, 65535]", param="tcp") from None
    listener.setblocking(False)
    return listener


def send_report(fd: int | None, report: StartReport) -> None:
    """Write the one line that the starter waits for, and close the pipe."""
    import msgspec

    if fd is None:
        return
    try:
        os.write(fd, msgspec.json.encode(report) + b"\n")
        os.close(fd)
    except OSError:
        return  # the starter is gone or has stopped waiting; serving does not depend on it
