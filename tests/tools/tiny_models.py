"""Tiny models whose weights are a rule and not a file: the scripts that record and the tests that compare make the same ones."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["values", "write_model"]


def values(name: str, shape: list[int]) -> np.ndarray:
    """The weights of a tensor: uniform numbers from the raw stream of PCG64, seeded with the name, scaled by its kind."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)
    uniform = ((raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)).reshape(shape)
    if "norm" in name:
        return np.float32(1) + np.float32(0.3) * uniform
    if name.endswith("bias"):
        return np.float32(0.3) * uniform
    if "embed" in name:
        return np.float32(0.5) * uniform
    return np.float32(2.0 / np.sqrt(shape[-1])) * uniform


def write_model(
    folder: Path, case: Mapping[str, Any], *, stem: str = "model", config: str = "config.json", **changes: Any
) -> Path:
    """Write the configuration (with `changes`) and STEM.safetensors of a recorded case; return the folder."""
    folder.mkdir(exist_ok=True)
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    at = 0
    for name, shape in case["tensors"].items():
        data = values(name, shape).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    (folder / f"{stem}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    (folder / config).write_text(json.dumps({**case["config"], **changes}))
    return folder
