"""The sampling that a model's makers recommend: in GGUF metadata, or in a generation_config.json beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagellm_core.loader.safetensors import load_json
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.sampling import SamplingParams

__all__ = ["file_defaults", "metadata_defaults"]

_GGUF_KEYS = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def metadata_defaults(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return what `general.sampling.*` of a GGUF file says; values out of range are left out."""
    return _valid({name: metadata.get(f"general.sampling.{key}") for key, name in _GGUF_KEYS.items()})


def file_defaults(directory: Path) -> dict[str, float]:
    """Return what a directory's generation_config.json says; empty without one. ``do_sample: false`` is greedy.

    Raises:
        ModelFileError: the file is no JSON object.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    values = load_json(path)
    if values.get("do_sample") is False:
        return {"temperature": 0.0}
    return _valid({name: values.get(name) for name in _GGUF_KEYS.values()})


def _valid(values: Mapping[str, Any]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        option: dict[str, Any] = {name: int(value) if name == "top_k" else float(value)}
        try:
            SamplingParams(**option)
        except InvalidArgumentError:
            continue
        out |= option
    return out
