from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_model

from sagellm_backend.base import LoadOptions, RowSampling, Runner, StepBatch, StepResult
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_core.loader import open_model
from sagellm_core.models import registry
from sagellm_protocol.sampling import SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "families.json").read_text())["families"]
SUPPORTED = {kind for family in registry.FAMILIES for kind in family.hf}
FAMILIES = {name: case for name, case in RECORDED.items() if case["config"]["model_type"] in SUPPORTED}


def rescore(runner: Runner, ids: list[int], rows: list[int], chunk: int) -> list[StepResult]:
    """Run `ids` in chunks; one result for each chunk that holds some of `rows`, in order."""
    out = []
    table = np.arange(runner.kv.n_blocks, dtype=np.int32)[None]
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        wanted = [r - start for r in rows if start <= r < start + len(part)]
        result = runner.step(
            StepBatch(
                token_ids=np.array(part, np.int32),
                starts=np.array([start], np.int32),
                lengths=np.array([len(part)], np.int32),
                block_tables=table,
                logit_rows=np.array(wanted, np.int32),
                sampling=[RowSampling(SamplingParams(temperature=0.0), logprobs=5)] * len(wanted),
                want_logits=True,
            )
        )
        if wanted:
            out.append(result)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(name: str, tmp_path: Path) -> None:
    """A tiny model of the family gives the logits of Hugging Face transformers within 1e-4."""
    case = FAMILIES[name]
    with open_model(write_model(tmp_path, case)) as model:
        runner = ReferenceBackend().load(model.spec, model.weights, LoadOptions(n_blocks=8))
    for chunk in (40, 7):
        results = rescore(runner, case["ids"], case["rows"], chunk)
        got = np.concatenate([r.logits for r in results if r.logits is not None])
        np.testing.assert_allclose(got, np.array(case["logits"]), atol=1e-4, rtol=0)


def check_model(path: Path, golden: str, which: slice = slice(None)) -> None:
    """Every recorded log-probability of the cases, by re-scoring the recorded text."""
    cases = json.loads((GOLDEN / golden).read_text())["cases"][which]
    with open_model(path) as model:
        runner = ReferenceBackend().load(model.spec, model.weights, LoadOptions(n_blocks=16))
    for case in cases:
        prompt, output = case["prompt_ids"], case["output_ids"]
        rows = list(range(len(prompt) - 1, len(prompt) + len(output) - 1))
        (result,) = rescore(runner, prompt + output[:-1], rows, chunk=512)
        assert result.logits is not None
        logprobs = np.stack([log_softmax(row) for row in result.logits])
        chosen = logprobs[np.arange(len(output)), output]
        np.testing.assert_allclose(chosen, case["logprobs"], atol=1e-4, err_msg=case["prompt"])
        top = np.take_along_axis(logprobs, np.array(case["top_ids"]), axis=1)
        np.testing.assert_allclose(top, case["top_logprobs"], atol=1e-4, err_msg=case["prompt"])
        np.testing.assert_array_equal(result.token_ids, output, err_msg=case["prompt"])
    runner.close()


@pytest.mark.model
def test_smollm2_equals_transformers(default_model_path: Path) -> None:
    """Prompts × 32 tokens of SmolLM2-135M Q4_1: log-probabilities equal transformers' within 1e-4."""
    check_model(default_model_path, "smollm2_135m_q4_1.json", slice(0, 20, 5))


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_equals_transformers_on_all_prompts(default_model_path: Path) -> None:
    """The same for all 20 recorded prompts."""
    check_model(default_model_path, "smollm2_135m_q4_1.json")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gemma3_equals_transformers(gemma_model_path: Path) -> None:
    """Prompts of Gemma-3-270M Q4_K_M: log-probabilities equal transformers' within 1e-4."""
    check_model(gemma_model_path, "gemma3_270m_q4_k_m.json")
