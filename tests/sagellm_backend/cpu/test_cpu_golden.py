"""The native backend on the real model, against log-probabilities of Hugging Face transformers in fp32."""

import json
from pathlib import Path

import numpy as np
import pytest

from sagellm_backend.base import LoadOptions, RowSampling, StepBatch
from sagellm_backend.cpu import CpuBackend
from sagellm_core.loader import open_model
from sagellm_protocol.sampling import SamplingParams

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "smollm2_135m_q4_1.json").read_text())["cases"]
N_BLOCKS = 8


def rescore(runner, case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the recorded tokens and the most likely ids, (outputs,) each, teacher-forced."""
    ids = [*case["prompt_ids"], *case["output_ids"]][:-1]
    first = len(case["prompt_ids"]) - 1
    rows = np.arange(first, len(ids), dtype=np.int32)
    sampling = [RowSampling(SamplingParams(temperature=0.0), logprobs=1, target=t) for t in case["output_ids"]]
    result = runner.step(
        StepBatch(
            token_ids=np.array(ids, np.int32),
            starts=np.array([0], np.int32),
            lengths=np.array([len(ids)], np.int32),
            block_tables=np.arange(N_BLOCKS, dtype=np.int32)[None],
            logit_rows=rows,
            sampling=sampling,
        )
    )
    return result.logprobs, result.top_ids[:, 0]


@pytest.mark.model
@pytest.mark.parametrize("quant", ["auto", "q8", "bf16"])
def test_the_native_backend_agrees_with_fp32(default_model_path, quant):
    """Mean |Δ log p| < 0.05, and the same top token wherever the reference's margin exceeds 0.3 nat, from 4-bit, 8-bit and bf16."""
    with open_model(default_model_path) as model:
        runner = CpuBackend().load(model.spec, model.weights, LoadOptions(n_blocks=N_BLOCKS, max_rows=128, quant=quant))
    deltas = []
    for case in GOLDEN:
        logprobs, top = rescore(runner, case)
        deltas.append(np.abs(logprobs - case["logprobs"]))
        best = np.array(case["top_logprobs"])
        sure = best[:, 0] - best[:, 1] > 0.3
        wrong = [i for i in np.flatnonzero(sure) if top[i] != case["top_ids"][i][0]]
        assert not wrong, (
            f"{case['prompt']!r}: another top token at {wrong}, margins {[best[i, 0] - best[i, 1] for i in wrong]}"
        )
    runner.close()
    assert np.mean(np.concatenate(deltas)) < 0.05
