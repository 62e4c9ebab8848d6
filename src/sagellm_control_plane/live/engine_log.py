"""What an engine process wrote: a file that the process appends to by itself, kept below a size.

The process holds the file and not a pipe, so it can go on writing when the process that started it has died.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

__all__ = ["EngineLog", "file_name", "log_path"]

_TAIL_BYTES = 256 * 1024


def file_name(engine_id: str) -> str:
    """Return an engine's id as a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", engine_id) or "_"


def log_path(directory: Path, engine_id: str) -> Path:
    """Return where an engine's log lies."""
    return directory / f"{file_name(engine_id)}.log"


class EngineLog:
    """The log of one engine, over all its restarts; `path` and one older part, ``path.1``.

    Args:
        path: where; the directory is made, for this user only.
        max_bytes: of each of the two parts.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._start = 0

    @property
    def older(self) -> Path:
        """The part before this one."""
        return self.path.with_name(self.path.name + ".1")

    def open(self) -> int:
        """Return a file descriptor for the process that starts now; `last_words` counts from here."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.rotate()
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._start = os.fstat(fd).st_size
        return fd

    def rotate(self) -> None:
        """Move what is there to the older part if it is over the limit.

        The writer keeps its descriptor (it appends, so it goes on at the start); lines of the same instant may be lost.
        """
        try:
            if self.path.stat().st_size <= self._max_bytes:
                return
            shutil.copyfile(self.path, self.older)
            self.older.chmod(0o600)
            os.truncate(self.path, 0)
            self._start = 0
        except FileNotFoundError:
            return

    def tail(self, lines: int) -> list[str]:
        """Return the last `lines` lines, from both parts."""
        found = _last_lines(self.path, lines)
        if len(found) < lines:
            found = _last_lines(self.older, lines - len(found)) + found
        return found

    def last_words(self) -> str:
        """Return the last line that the current process wrote; empty if there is none."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._start, self.path.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:400] if lines else ""


def _last_lines(path: Path, lines: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    found = text.splitlines()
    if size > _TAIL_BYTES:
        found = found[1:]  # cut in the middle
    return found[-lines:] if lines > 0 else []
