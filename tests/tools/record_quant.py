"""Record golden vectors for `sagellm_backend.quant` with the `gguf` package's own (de)quantisation.

Run with a Python that has ``gguf`` and ``numpy``:  python tests/tools/record_quant.py > tests/golden/quant.json

Blocks are random bytes with a sane scale, so that every bit of a layout matters; `values` are float32 sums and samples of
the 4 blocks, exact as hex.
"""

from __future__ import annotations

import base64
import json
import sys

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants

DECODE = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
ENCODE = ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]
BLOCK_BYTES = {
    "F16": 2,
    "BF16": 2,
    "Q4_0": 18,
    "Q4_1": 20,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q8_0": 34,
    "Q4_K": 144,
    "Q5_K": 176,
    "Q6_K": 210,
}
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def b64(array: np.ndarray) -> str:
    """Raw little-endian bytes as text."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def main() -> None:
    """Write the JSON to standard output."""
    rng = np.random.default_rng(20)
    out: dict[str, dict[str, dict[str, str]]] = {"decode": {}, "encode": {}}
    for name in DECODE:
        size = BLOCK_BYTES[name] if name not in ("F16", "BF16") else 64
        blocks = rng.integers(0, 256, (4, size), dtype=np.uint8)
        if name in ("F16", "BF16"):
            source = rng.standard_normal((4, 32)).astype(np.float32)
            blocks = quants.quantize(source, Kind[name]).reshape(4, -1).view(np.uint8)
        for at in HALVES.get(name, []):
            blocks[:, at : at + 2] = rng.uniform(-0.1, 0.1, (4, 1)).astype("<f2").view(np.uint8)
        values = quants.dequantize(blocks, Kind[name]).astype("<f4")
        out["decode"][name] = {"blocks": b64(blocks), "values": b64(values)}
    for name in ENCODE:
        source = (rng.standard_normal((6, 64)) * 10.0 ** rng.integers(-3, 3, (6, 1))).astype("<f4")
        source[0, :32] = 0
        source[1, :32] = 0.75
        out["encode"][name] = {"source": b64(source), "blocks": b64(quants.quantize(source, Kind[name]).view(np.uint8))}
    json.dump(out, sys.stdout, indent=0)


main()
