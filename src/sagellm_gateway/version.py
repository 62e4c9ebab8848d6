"""The version that /version reports: that of the installed distribution."""

from __future__ import annotations

from functools import cache
from importlib import metadata

__all__ = ["version"]


@cache
def version() -> str:
    """Return the version of `isagellm`, or ``0+source`` when it runs from a source tree that is not installed."""
    try:
        return metadata.version("isagellm")
    except metadata.PackageNotFoundError:
        return "0+source"
