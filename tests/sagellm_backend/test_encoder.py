from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_model

from sagellm_backend.base import LoadOptions
from sagellm_backend.encoder import EncodeBatch, EncoderBackend, EncoderRunner
from sagellm_backend.reference import ReferenceBackend
from sagellm_core.loader.encoder import open_encoder
from sagellm_core.text.load import load_tokenizer

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "encoders.json").read_text())
TINY: dict[str, dict[str, Any]] = GOLDEN["tiny"]
OPTIONS = LoadOptions(n_blocks=0)


def load(path: Path) -> EncoderRunner:
    files = open_encoder(path)
    return ReferenceBackend().load_encoder(files.spec, files.weights, OPTIONS)


def batch(cases: list[dict[str, Any]], output: str) -> EncodeBatch:
    return EncodeBatch(
        token_ids=np.concatenate([np.array(c["ids"], np.int32) for c in cases]),
        token_types=np.concatenate([np.array(c.get("types", [0] * len(c["ids"])), np.int32) for c in cases]),
        lengths=np.array([len(c["ids"]) for c in cases], np.int32),
        output=output,
    )


@pytest.mark.parametrize("name", TINY)
def test_encoder_equals_transformers(name: str, tmp_path: Path) -> None:
    """A tiny encoder of the kind gives transformers' pooled states and logits within 1e-4, all inputs in one batch."""
    case = TINY[name]
    runner = load(write_model(tmp_path, case))
    for output in {"cls", "mean", "last", "labels"} & set(case["cases"][0]):
        got = runner.encode(batch(case["cases"], output))
        np.testing.assert_allclose(got, [c[output] for c in case["cases"]], atol=1e-4, err_msg=output)


def test_company_does_not_matter(tmp_path: Path) -> None:
    """An input gives the same bits alone and among others."""
    case = TINY["bert"]
    runner = load(write_model(tmp_path, case))
    together = runner.encode(batch(case["cases"] + case["cases"][::-1], "mean"))
    for i, one in enumerate(case["cases"]):
        np.testing.assert_array_equal(runner.encode(batch([one], "mean"))[0], together[i])
        np.testing.assert_array_equal(together[-1 - i], together[i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.array([64], np.int32)}, "vocabulary of 64"),
        ({"lengths": np.array([2], np.int32)}, "1 token ids for lengths"),
        ({"token_types": np.array([2], np.int32)}, "token types"),
        ({"output": "labels"}, "no classifier"),
        ({"token_ids": np.zeros(67, np.int32), "lengths": np.array([67], np.int32)}, "67 tokens.*context of 66"),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A batch that does not add up is refused with its numbers."""
    runner = load(write_model(tmp_path, TINY["bert"]))
    fields: dict[str, Any] = {"token_ids": np.array([1], np.int32), "lengths": np.array([1], np.int32), "output": "cls"}
    with pytest.raises(ValueError, match=message):
        runner.encode(EncodeBatch(**fields | change))


def test_missing_weight_is_named(tmp_path: Path) -> None:
    """A slot that is missing is named."""
    files = open_encoder(write_model(tmp_path, TINY["bert"]))
    weights = {slot: files.weights[slot] for slot in files.spec.slots() if slot != "1.ffn_norm_bias"}
    with pytest.raises(ValueError, match=r"1\.ffn_norm_bias"):
        ReferenceBackend().load_encoder(files.spec, weights, OPTIONS)


def test_protocols_and_closing(tmp_path: Path) -> None:
    """The reference satisfies the encoder protocols; a closed runner refuses work."""
    assert isinstance(ReferenceBackend(), EncoderBackend)
    runner = load(write_model(tmp_path, TINY["bert"]))
    assert isinstance(runner, EncoderRunner)
    assert runner.weight_bytes == sum(4 * int(np.prod(shape)) for shape in runner.spec.slots().values())
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.encode(batch(TINY["bert"]["cases"], "cls"))


@pytest.mark.model
def test_minilm_equals_transformers(minilm_model_path: Path) -> None:
    """Token ids of all-MiniLM-L6-v2 equal transformers', and embeddings have a cosine of at least 0.9999 with them."""
    tokenizer, files = load_tokenizer(minilm_model_path), open_encoder(minilm_model_path)
    assert (files.spec.pooling, files.spec.normalize, files.spec.context_length) == ("mean", True, 256)
    cases = GOLDEN["all-MiniLM-L6-v2"]
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    runner = ReferenceBackend().load_encoder(files.spec, files.weights, OPTIONS)
    got = runner.encode(batch(cases, "mean"))
    got /= np.linalg.norm(got, axis=1, keepdims=True)
    want = np.array([case["vector"] for case in cases])
    assert (got * want).sum(axis=1).min() >= 0.9999
    np.testing.assert_allclose(got, want, atol=1e-5)
