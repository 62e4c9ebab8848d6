"""Shapes of the tiles that a matrix product is cut into."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIXED", "Tiles", "tiles_for"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows, outputs and inputs of a tile, and how many warps work on it."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


FIXED = Tiles(64, 64, 64, 4, 3)
"""For batch invariance: the same whatever the batch."""

_FEW, _SOME, _MANY = Tiles(16, 32, 128, 4, 4), Tiles(64, 64, 64, 4, 4), Tiles(128, 128, 64, 8, 3)


def tiles_for(rows: int) -> Tiles:
    """Tiles for a product of so many rows: decode is bound by the weights' bytes, prefill by arithmetic."""
    return _FEW if rows <= 16 else _SOME if rows <= 128 else _MANY
