"""The border where exceptions become one line for a person: the fact, the number, the cure."""

from __future__ import annotations

import errno
import os
import sys

from sagellm._version import __version__
from sagellm_protocol.errors import InternalError, SageError

__all__ = ["INTERRUPTED", "describe", "exit_status", "reader_went_away", "report"]

INTERRUPTED = 130


def exit_status(code: object) -> int:
    """Return the process status of a `SystemExit` code."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    _write(str(code).removeprefix("error: "))
    return 1


def reader_went_away() -> int:
    """Leave quietly when the reader of our output did (``sage-llm list | head -1``)."""
    # The interpreter flushes stdout on leaving and would complain once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report(error: BaseException) -> int:
    """Write the error's line and return the exit status."""
    _write(describe(error))
    return 1


def _write(message: str) -> None:
    from sagellm.catalogue import find

    sys.stderr.write(f"error: {message}\n")
    if (entry := find(message)) is not None:
        sys.stderr.write(f"       more: sage-llm explain {entry.code}\n")


def describe(error: BaseException) -> str:
    """Return the fact and the cure, in one line."""
    if isinstance(error, InternalError):
        return f"{error} (this is a bug: run again with --debug and report the traceback)"
    if isinstance(error, SageError):
        return str(error)
    if isinstance(error, OSError):
        return _describe_os(error)
    if isinstance(error, ModuleNotFoundError):
        return _describe_missing(error)
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller model, or pass --ctx and --parallel with smaller numbers"
    return f"{type(error).__name__}: {error} (this is a bug of ours: run again with --debug and report it)"


def _describe_os(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename is not None else ""
    cure = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check its permissions",
        errno.ENOSPC: "free some disk space",
        errno.EADDRINUSE: "pass another --port, or --port 0 for a free one",
        errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    }.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f": {cure}" if cure else "")


_EXTRA_OF = {
    "starlette": "gateway",
    "uvicorn": "gateway",
    "uvloop": "gateway",
    "httptools": "gateway",
    "prometheus_client": "gateway",
    "huggingface_hub": "hub",
    "ray": "ray",
    "opentelemetry": "otel",
    "torch": "cuda",
    "triton": "cuda",
}


def _describe_missing(error: ModuleNotFoundError) -> str:
    module = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(module)
    if extra is not None:
        return f"this needs the {extra} extra ({module} is not installed): pip install 'isagellm[{extra}]'"
    return f"{error}: the installation is incomplete: pip install --force-reinstall 'isagellm=={__version__}'"
