"""Random ids. The system is asked for many at once: a call costs more than the rest of making one."""

from __future__ import annotations

import os

__all__ = ["new_id"]

_DIGITS = 24
_MANY = 256
_pool: list[str] = []
# Two processes must never draw from one pool.
os.register_at_fork(after_in_child=_pool.clear)


def new_id(prefix: str) -> str:
    """Return a fresh id, ``<prefix><24 hex digits>``, that nobody can guess."""
    if not _pool:
        digits = os.urandom(_MANY * _DIGITS // 2).hex()
        _pool.extend([digits[at : at + _DIGITS] for at in range(0, len(digits), _DIGITS)])
    return prefix + _pool.pop()
