"""A tiny random llama, as GGUF metadata and tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_backend.tensors import Tensor
from sagellm_core.loader.gguf_write import write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a", "b", "ab"] * 4,
    "tokenizer.ggml.scores": [0.5] * 12,
    "general.quantization_version": 2,
}


def _tensors() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (12, 32), "output_norm.weight": (32,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
                "attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
            }.items()
        }  # fmt: skip
    return {name: Tensor.of(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def tiny_tensors() -> dict[str, Tensor]:
    """Weights of the tiny model under their GGUF names."""
    return _tensors()


@pytest.fixture
def tiny_gguf(tmp_path: Path, tiny_tensors: dict[str, Tensor]) -> Callable[..., Path]:
    """Write the tiny model with changed metadata (None removes a key) or tensors, return its path."""

    def write(metadata: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None) -> Path:
        values = {k: v for k, v in (METADATA | (metadata or {})).items() if v is not None}
        weights = {k: v for k, v in (tiny_tensors | (tensors or {})).items() if v is not None}
        path = tmp_path / "tiny.gguf"
        write_gguf(path, values, weights)
        return path

    return write
