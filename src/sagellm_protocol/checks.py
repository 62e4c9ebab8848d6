"""Range checks shared by the protocol types; each failure names the field, the value and the range."""

from __future__ import annotations

import math

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["at_least", "in_range", "not_empty"]


def in_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise `InvalidArgumentError` unless `value` is finite and lies in [low, high], or (low, high] if `low_open`."""
    above = value > low if low_open else value >= low
    if not (math.isfinite(value) and above and value <= high):
        raise InvalidArgumentError(
            f"{name} is {value}: it must lie in {'(' if low_open else '['}{low}, {high}]", param=name.partition("[")[0]
        )


def at_least(name: str, value: float, low: float) -> None:
    """Raise `InvalidArgumentError` unless `value` is finite and not below `low`."""
    if not (math.isfinite(value) and value >= low):
        raise InvalidArgumentError(f"{name} is {value}: it must be at least {low}", param=name.partition("[")[0])


def not_empty(name: str, value: str) -> None:
    """Raise `InvalidArgumentError` if `value` is the empty string."""
    if not value:
        raise InvalidArgumentError(f"{name} is empty: give it a value", param=name)
