from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_backend.base import LoadOptions, RowSampling, StepBatch
from sagellm_backend.cpu import CpuBackend
from sagellm_backend.sampling import log_softmax
from sagellm_core.loader import open_model
from sagellm_protocol.sampling import SamplingParams

GOLDEN = Path(__file__).parents[2] / "golden"
MARGIN = 0.3


def compare(path: Path, golden: str, quant: str) -> tuple[float, float, list[str]]:
    """Mean |Δ log-probability| of the recorded tokens, agreement, and disagreements beyond `MARGIN` nat."""
    cases: list[dict[str, Any]] = json.loads((GOLDEN / golden).read_text())["cases"]
    with open_model(path) as files:
        options = LoadOptions(n_blocks=16, max_rows=256, max_logit_rows=32, quant=quant)
        runner = CpuBackend().load(files.spec, files.weights, options)
    errors: list[float] = []
    agreed: list[bool] = []
    wrong: list[str] = []
    for case in cases:
        ids, output = case["prompt_ids"] + case["output_ids"][:-1], case["output_ids"]
        first = len(case["prompt_ids"]) - 1
        result = runner.step(
            StepBatch(
                token_ids=np.array(ids, np.int32),
                starts=np.array([0], np.int32),
                lengths=np.array([len(ids)], np.int32),
                block_tables=np.arange(16, dtype=np.int32)[None],
                logit_rows=np.arange(first, first + len(output), dtype=np.int32),
                sampling=[RowSampling(SamplingParams(temperature=0.0))] * len(output),
                want_logits=True,
            )
        )
        assert result.logits is not None
        for i, token in enumerate(output):
            errors.append(abs(float(log_softmax(result.logits[i])[token]) - case["logprobs"][i]))
            best, second = case["top_logprobs"][i][:2]
            agreed.append(int(result.token_ids[i]) == case["top_ids"][i][0])
            if not agreed[-1] and best - second > MARGIN:
                wrong.append(f"{case['prompt']!r} token {i}, margin {best - second:.2f}")
    runner.close()
    return float(np.mean(errors)), float(np.mean(agreed)), wrong


@pytest.mark.model
@pytest.mark.parametrize("quant", ["auto", "q8", "bf16"])
def test_smollm2_agrees_with_the_recorded_float32(quant: str, default_model_path: Path) -> None:
    """On 20 prompts × 32 tokens the top token agrees wherever its margin exceeds 0.3 nat, mean |Δ log-probability| < 0.05."""
    error, agreement, wrong = compare(default_model_path, "smollm2_135m_q4_1.json", quant)
    assert not wrong
    assert error < 0.05
    assert agreement > 0.95


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["auto", "q8", "bf16"])
def test_gemma3_agrees_with_the_recorded_float32(quant: str, gemma_model_path: Path) -> None:
    """The same for Gemma-3-270M."""
    error, _, wrong = compare(gemma_model_path, "gemma3_270m_q4_k_m.json", quant)
    assert not wrong
    assert error < 0.05
