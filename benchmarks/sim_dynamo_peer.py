"""Dynamo's offline replay, run by its own interpreter: a job as JSON on stdin, a line of JSON for each router and speed-up on stdout.

Environment: ``pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1`` and ``pip install numpy pydantic uvloop typing-extensions``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from dynamo._core import run_mocker_trace_replay


def timing(constants: dict[str, float], path: Path) -> dict[str, object]:
    """Write the step times as Dynamo reads them: prefill by tokens of a step, decode by tokens of context and their mean length.

    Dynamo's step takes prefill(chunk) + decode(batch), and decode takes nothing without a batch. A chunk of the whole token budget
    is only possible without a decoding sequence: there, the step's fixed part and that of its sequence belong to the prefill.
    """
    budget, tps, step = constants["step_tokens"], constants["prefill_tps"], constants["step_s"]
    tokens = np.array([0.0, budget - 1.0, budget, 64.0 * budget])
    alone = step + constants["per_sequence_s"]
    prefill = tokens / tps + np.array([0.0, 0.0, alone, alone])
    held = np.array([0.0, float(constants["n_blocks"] * constants["block_size"])])
    length = np.geomspace(16.0, 400_000.0, 400)
    decode = step + constants["per_sequence_s"] * held[:, None] / length + constants["per_token_s"] * held[:, None]
    np.savez(
        path,
        prefill_isl=tokens,
        prefill_ttft_ms=prefill * 1e3,
        decode_active_kv_tokens=held,
        decode_context_length=length,
        decode_itl=decode * 1e3,
    )
    return {"type": "external", "provider": "dynamo_profile", "config": {"path": str(path)}}


def main() -> None:
    job = json.load(sys.stdin)
    constants = job["constants"]
    with tempfile.TemporaryDirectory() as folder:
        engine = {
            "num_gpu_blocks": constants["n_blocks"],
            "block_size": constants["block_size"],
            "max_num_batched_tokens": constants["step_tokens"],
            "max_num_seqs": constants["max_sequences"],
            "timing_model": timing(constants, Path(folder, "steps.npz")),
        }
        for router in job["routers"]:
            for speed in job["speeds"]:
                report = run_mocker_trace_replay(
                    [job["trace"]],
                    extra_engine_args={"engine": engine},
                    num_workers=job["engines"],
                    router_mode=router,
                    arrival_speedup_ratio=speed,
                    trace_block_size=constants["block_size"],
                    capture_per_request=True,
                )
                rows = report.per_request
                good = sum(
                    row["terminal_status"] == "completed"
                    and row["ttft_ms"] <= job["ttft_s"] * 1e3
                    and row["last_token_ms"] - row["first_token_ms"]
                    <= job["tpot_s"] * 1e3 * max(row["output_length"] - 1, 1)
                    for row in rows
                )
                hit = report.summary["prefix_cache_reused_ratio"]
                found = {
                    "router": router,
                    "speed": speed,
                    "goodput": good / len(rows),
                    "requests": len(rows),
                    "hit": hit,
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
