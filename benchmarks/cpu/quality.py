"""Divergence from float32 of our paths and of llama.cpp, on the same weights, text and positions.

    python benchmarks/cpu/quality.py MODEL.gguf [--positions 200] [--threads 2]

llama.cpp gives the log-probabilities of its likeliest `TOP` tokens; everything else counts as one more outcome, for all paths alike,
so the divergences (and top-1 agreement) are comparable with each other; they are lower bounds of the full ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import peers

from sagellm.bench.quality import QualityPath, shipped_text
from sagellm_backend.auto import pick
from sagellm_backend.base import LoadOptions, RowSampling, StepBatch
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_core.loader import open_model
from sagellm_core.text.load import load_tokenizer
from sagellm_protocol.sampling import SamplingParams

TOP = 256
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
    peers.install("llama.cpp")
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


def report(label: str, mine: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """Print one row."""
    divergence = [float((np.exp(q) * (q - p)).sum()) for p, q in zip(mine, theirs, strict=True)]
    agreed = np.mean([p[:-1].argmax() == q[:-1].argmax() for p, q in zip(mine, theirs, strict=True)])
    print(f"| {label} | {np.mean(divergence):.5f} | {np.quantile(divergence, 0.99):.4f} | {agreed:.1%} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ids = load_tokenizer(options.model).encode(shipped_text())[: FIRST + options.positions]
    positions = list(range(FIRST, len(ids)))
    peer = llamacpp(options.model, ids, positions, options.threads)
    keys = [np.array(sorted(row)) for row in peer]
    reference = ours(options.model, ids, positions, None, options.threads)
    exact = [bucketed(row[k]) for row, k in zip(reference, keys, strict=True)]
    print(f"{options.model.name}, {len(positions)} positions, KL from float32 over the {TOP} likeliest and the rest\n")
    print("| path | KL | KL p99 | top-1 |\n|---|---|---|---|")
    report(
        "llama.cpp", [bucketed(np.array([row[int(t)] for t in k])) for row, k in zip(peer, keys, strict=True)], exact
    )
    for path in (QualityPath(), QualityPath("q8"), QualityPath("bf16")):
        rows = ours(options.model, ids, positions, path, options.threads)
        report(f"isagellm {path.quant}", [bucketed(row[k]) for row, k in zip(rows, keys, strict=True)], exact)


if __name__ == "__main__":
    main()
