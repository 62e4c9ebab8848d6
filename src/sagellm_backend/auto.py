"""Which backend to use when nobody says."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

from sagellm_backend.base import Backend
from sagellm_backend.registry import load
from sagellm_protocol.errors import UnsupportedError

__all__ = ["SlowBackendWarning", "pick"]


class SlowBackendWarning(UserWarning):
    """The numpy backend serves because the native one cannot."""


def pick(name: str = "auto") -> Backend:
    """Return the backend `name`, ready to load a model.

    ``auto`` is the native CPU backend; where it was not built, the numpy one with a warning that says what to install.

    Raises:
        InvalidArgumentError: there is no backend of that name.
        UnsupportedError: it cannot run here; the message says why and what to do.
    """
    if name != "auto":
        backend = load(name)
        reason = backend.available()
        if reason is not None:
            raise UnsupportedError(f"backend {name!r} cannot run here: {reason}", param="backend")
        return backend
    native = load("cpu")
    reason = native.available()
    if reason is None:
        return native
    if find_spec("sagellm_backend.cpu._native") is not None:
        raise UnsupportedError(f"backend 'cpu' cannot run here: {reason}", param="backend")
    # One call site, one text: Python's default filter shows it once a process.
    warnings.warn(
        f"the native CPU backend cannot run ({reason}); the numpy backend serves instead, many times slower. "
        "Install a C++17 compiler and CMake (Debian: apt install g++ cmake), then: "
        "pip install --force-reinstall --no-cache-dir isagellm",
        SlowBackendWarning,
        stacklevel=2,
    )
    return load("reference")
