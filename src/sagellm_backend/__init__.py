"""What a device can do: the narrow waist (`base`, `spec`, `tensors`) and its executors (`cpu`, `reference`, `mock`, `cuda`)."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Names of isagellm 0.1 - 0.5, working or with the name of what to use instead: see docs/migration.md."""
    if name.startswith("_") and name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("sagellm.migrate.packages").resolve(__name__, name)
