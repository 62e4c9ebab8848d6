"""Divergence from float32 of our paths and of llama.cpp, on the same weights, text and positions.

    python benchmarks/cpu/quality.py MODEL.gguf [--positions 400] [--threads 2]

llama.cpp gives the log-probabilities of its likeliest `TOP` tokens; everything else counts as one more outcome, for all paths alike,
so the divergences (and top-1 agreement) are comparable with each other; they are lower bounds of the full ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import peers
from report import kl_table

from sagellm.bench.quality import QualityPath, shipped_text
from sagellm_backend.auto import pick
from sagellm_backend.base import LoadOptions, RowSampling, StepBatch
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_core.loader import open_model
from sagellm_core.text.load import load_tokenizer
from sagellm_protocol.sampling import SamplingParams

TOP = 256
POSITIONS = 400
FIRST = 64
CHUNK = 64


def ours(model: Path, ids: list[int], positions: list[int], path: QualityPath | None, threads: int) -> np.ndarray:
    """Log-probabilities (positions, vocab) of one path; None is the float32 reference."""
    backend = ReferenceBackend() if path is None else pick(path.backend)
    quant = "auto" if path is None else path.quant
    options = LoadOptions(
        n_blocks=-(-len(ids) // 16), max_rows=CHUNK, max_logit_rows=CHUNK, threads=threads if path else 0, quant=quant
    )
    with open_model(model) as files:
        runner = backend.load(files.spec, files.weights, options)
    wanted = set(positions)
    out = []
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        rows = [i for i in range(len(part)) if start + i in wanted]
        result = runner.step(
            StepBatch(
                token_ids=np.array(part, np.int32),
                starts=np.array([start], np.int32),
                lengths=np.array([len(part)], np.int32),
                block_tables=np.arange(options.n_blocks, dtype=np.int32)[None],
                logit_rows=np.array(rows, np.int32),
                sampling=[RowSampling(SamplingParams(temperature=0.0))] * len(rows),
                want_logits=True,
            )
        )
        if rows:
            out += [log_softmax(row).astype(np.float64) for row in result.logits]
    runner.close()
    return np.array(out)


def llamacpp(model: Path, ids: list[int], positions: list[int], threads: int) -> list[dict[int, float]]:
    """Token -> log-probability for each position."""
    job = {"model": str(model), "threads": threads, "ids": ids, "positions": positions, "top": TOP}
    done = subprocess.run(
        [str(peers.python_of("llama.cpp")), str(Path(__file__).with_name("llamacpp_logprobs.py"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=True,
    )
    return [dict(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[[")]


def bucketed(logprobs: np.ndarray) -> np.ndarray:
    """Append the log-probability of all other tokens."""
    rest = max(1e-12, 1 - float(np.exp(logprobs).sum()))
    return np.append(logprobs, np.log(rest))


def measures(name: str, mine: list[np.ndarray], theirs: list[np.ndarray]) -> dict:
    """Return one row: mean divergence of `mine` from `theirs`, its 99th percentile, agreement on the likeliest token."""
    divergence = [float((np.exp(q) * (q - p)).sum()) for p, q in zip(mine, theirs, strict=True)]
    agreed = np.mean([p[:-1].argmax() == q[:-1].argmax() for p, q in zip(mine, theirs, strict=True)])
    return {
        "name": name,
        "kl": float(np.mean(divergence)),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top1": float(agreed),
    }


def compare(model: Path, count: int, threads: int) -> dict:
    """Return the divergence of llama.cpp and of our paths from float32 on the file's own values, at `count` positions."""
    peers.install("llama.cpp")
    ids = load_tokenizer(model).encode(shipped_text())[: FIRST + count]
    positions = list(range(FIRST, len(ids)))
    peer = llamacpp(model, ids, positions, threads)
    keys = [np.array(sorted(row)) for row in peer]
    exact = [bucketed(row[k]) for row, k in zip(ours(model, ids, positions, None, threads), keys, strict=True)]
    theirs = [bucketed(np.array([row[int(t)] for t in k])) for row, k in zip(peer, keys, strict=True)]
    paths = [measures("llama.cpp", theirs, exact)]
    for path in (QualityPath(), QualityPath("q8"), QualityPath("bf16")):
        rows = ours(model, ids, positions, path, threads)
        mine = [bucketed(row[k]) for row, k in zip(rows, keys, strict=True)]
        paths.append(measures(f"isagellm --quant {path.quant}", mine, exact))
    title = f"{model.name}, {len(positions)} positions: KL from float32 over the {TOP} likeliest tokens and the rest"
    return {"title": title, "paths": paths}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=POSITIONS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print("\n".join(kl_table(compare(options.model, options.positions, options.threads))))


if __name__ == "__main__":
    main()
