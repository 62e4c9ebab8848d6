"""Whether the compiled extension and the Python files belong together.

An update of the Python files alone, as `git pull` in an editable installation or a copy over an old one, leaves the extension of
before. Both sides know the hash of ``_native.pyi``, which declares all that one calls of the other.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

__all__ = ["CURE", "expected", "other_build"]

CURE = "pip install --force-reinstall --no-deps --no-cache-dir isagellm (in a source tree: pip install -e .)"


@functools.cache
def expected() -> str:
    """Return the hash that an extension for these Python files has."""
    return hashlib.sha256(Path(__file__).with_name("_native.pyi").read_bytes()).hexdigest()


def other_build() -> str | None:
    """Return None if the extension that is installed was built for these Python files, else the fact and the cure."""
    from sagellm_backend.cpu import _native

    # A build from before there was such a hash has none.
    built: str = getattr(_native, "INTERFACE", "none")
    if built == expected():
        return None
    return (
        f"its compiled extension was built for another version (interface {built[:8]}, these Python files need "
        f"{expected()[:8]}): {CURE}"
    )
