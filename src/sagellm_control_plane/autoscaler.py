"""How many engines each model should have."""

from __future__ import annotations

from sagellm_control_plane.types import AutoscalerConfig

__all__ = ["AutoscalerConfig"]
