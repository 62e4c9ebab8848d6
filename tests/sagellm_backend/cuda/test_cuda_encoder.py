"""Encoders on torch's CPU device against transformers' recorded numbers and the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-cuda")

from tiny_models import write_model

from sagellm_backend.base import LoadOptions
from sagellm_backend.cuda import CudaBackend
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.encoder import EncodeBatch, EncodeOutput, EncoderBackend, EncoderRunner
from sagellm_core.loader.encoder import open_encoder
from sagellm_protocol.errors import UnsupportedError

pytestmark = pytest.mark.cuda

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden" / "encoders.json").read_text())
OPTIONS = LoadOptions(n_blocks=0)
EXACT = CudaBackend(CudaSettings(device="cpu", dtype="f32"))


def batch(cases: list[dict[str, Any]], output: EncodeOutput) -> EncodeBatch:
    return EncodeBatch(
        token_ids=np.concatenate([np.array(c["ids"], np.int32) for c in cases]),
        token_types=np.concatenate([np.array(c.get("types", [0] * len(c["ids"])), np.int32) for c in cases]),
        lengths=np.array([len(c["ids"]) for c in cases], np.int32),
        output=output,
    )


@pytest.mark.parametrize("name", GOLDEN["tiny"])
def test_encoder_equals_transformers(name: str, tmp_path: Path) -> None:
    """A tiny encoder of the kind gives transformers' pooled states and logits within 1e-4, all inputs in one batch."""
    case = GOLDEN["tiny"][name]
    files = open_encoder(write_model(tmp_path, case))
    runner = EXACT.load_encoder(files.spec, files.weights, OPTIONS)
    for output in {"cls", "mean", "last", "labels"} & set(case["cases"][0]):
        got = runner.encode(batch(case["cases"], output))
        np.testing.assert_allclose(got, [c[output] for c in case["cases"]], atol=1e-4, err_msg=output)


def test_protocols_and_closing(tmp_path: Path) -> None:
    """The backend satisfies the encoder protocols; a closed runner and options without meaning are refused."""
    assert isinstance(EXACT, EncoderBackend)
    files = open_encoder(write_model(tmp_path, GOLDEN["tiny"]["bert"]))
    runner = EXACT.load_encoder(files.spec, files.weights, OPTIONS)
    assert isinstance(runner, EncoderRunner)
    assert runner.weight_bytes == sum(4 * int(np.prod(shape)) for shape in runner.spec.slots().values())
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.encode(batch(GOLDEN["tiny"]["bert"]["cases"], "cls"))
    with pytest.raises(UnsupportedError, match="no threads to set"):
        EXACT.load_encoder(files.spec, files.weights, LoadOptions(n_blocks=0, threads=2))


@pytest.mark.model
@pytest.mark.parametrize(
    ("quant", "dtype", "least"), [("auto", "f32", 0.99999), ("bf16", "auto", 0.999), ("q8", "bf16", 0.998)]
)
def test_minilm_keeps_its_directions(minilm_model_path: Path, quant: Any, dtype: Any, least: float) -> None:
    """Embeddings of all-MiniLM-L6-v2 point where transformers' point, in every precision."""
    files = open_encoder(minilm_model_path)
    backend = CudaBackend(CudaSettings(device="cpu", dtype=dtype))
    runner = backend.load_encoder(files.spec, files.weights, LoadOptions(n_blocks=0, quant=quant))
    cases = GOLDEN["all-MiniLM-L6-v2"]
    got = runner.encode(batch(cases, "mean"))
    got /= np.linalg.norm(got, axis=1, keepdims=True)
    want = np.array([case["vector"] for case in cases])
    assert (got * want).sum(axis=1).min() >= least
