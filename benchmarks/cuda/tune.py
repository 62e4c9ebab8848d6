"""Which tiles serve best: products of one row (`vector.TILES`), attention of a large batch (`TritonOps`). What this finds is written
into the code by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from bench import Bench, Row
from shapes import random_runner
from speed import decode_batch, decode_seconds

from sagellm_backend.base import BLOCK_SIZE, LoadOptions
from sagellm_backend.cuda.kernels import attention, vector
from sagellm_backend.cuda.plan import plan_step, upload
from sagellm_backend.cuda.triton_ops import TritonOps
from sagellm_backend.spec import DecoderSpec

__all__ = ["tune"]

CANDIDATES = [
    vector.VectorTiles(4, 512, 4), vector.VectorTiles(4, 1024, 4), vector.VectorTiles(8, 512, 4),
    vector.VectorTiles(16, 256, 4), vector.VectorTiles(16, 512, 8), vector.VectorTiles(2, 1024, 2),
]  # fmt: skip

_ATTENTION = [(64, 2, 4, 1), (64, 3, 4, 1), (64, 3, 8, 1), (128, 2, 4, 1), (128, 2, 8, 1), (32, 4, 4, 1), (64, 3, 4, 2)]
"""Keys, stages, warps and splits of a tile."""


def tune(bench: Bench) -> Iterator[Row]:
    """Attention first; then bytes a second of each candidate for each product of both models, and a step with the best of each."""
    yield from _attention(bench)
    for name, spec in (("Qwen3-0.6B", bench.sizes.small), ("Llama-3.1-8B", bench.sizes.large)):
        for key in _products(spec):
            yield from _one(bench, name, key)
        yield from _decode(bench, name, spec)


def _attention(bench: Bench) -> Iterator[Row]:
    """One layer of the large decode step in several tiles."""
    spec, batch, context = bench.sizes.large, bench.sizes.batch, bench.sizes.context
    heads, kv_heads, dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
    width = -(-context // BLOCK_SIZE)
    ops = TritonOps(bench.dtype, heads // kv_heads)
    plan = plan_step(decode_batch([context - 1] * batch, width, [1] * batch), ops.short_rows, ops.long_rows)
    step = upload(plan, bench.device)
    cache = torch.randn(batch * width, 2, kv_heads, BLOCK_SIZE, dim, device=bench.device).to(bench.dtype)
    q = torch.randn(batch, heads, dim, device=bench.device).to(bench.dtype)
    out, rows, found = torch.empty_like(q), (step.starts, step.firsts, step.lengths), {}
    for keys, stages, warps, splits in _ATTENTION if bench.settings.on_gpu else _ATTENTION[:1]:
        tile = attention.TileShape(
            ops.short_rows, max(16, ops.short_rows * heads // kv_heads), keys, splits, 0, warps, stages
        )
        run = partial(
            attention.attend, q, cache, step.tables, step.short, rows, out, tile, scale=dim**-0.5, window=0, cap=0.0
        )
        seconds = bench.seconds(run, repeats=10)
        found[f"{keys} keys, {stages} stages, {warps} warps, {splits} splits"] = (
            cache.numel() * cache.element_size() / seconds
        )
    rates = "; ".join(f"{name}: {rate / 1e12:.2f}" for name, rate in found.items())
    yield {"work": f"attention of {batch} rows at {context}", "value": f"TB/s by tile: {rates}"}


def _products(spec: DecoderSpec) -> list[vector.ProductKey]:
    heads, d = spec.n_heads * spec.head_dim, spec.d_model
    kv = spec.n_kv_heads * spec.head_dim
    return [
        vector.ProductKey(heads + 2 * kv, d, gated=False), vector.ProductKey(d, heads, gated=False),
        vector.ProductKey(spec.d_ff, d, gated=True), vector.ProductKey(d, spec.d_ff, gated=False),
        vector.ProductKey(spec.vocab_size, d, gated=False),
    ]  # fmt: skip


def _one(bench: Bench, name: str, key: vector.ProductKey) -> Iterator[Row]:
    rows = key.outputs * (2 if key.gated else 1)
    # Several copies in turn: one alone would stay in the chip's cache.
    copies = max(1, min(16, (256 << 20) // (rows * key.inputs * 2))) if bench.settings.on_gpu else 1
    weights = [torch.randn(rows, key.inputs, device=bench.device).to(bench.dtype) for _ in range(copies)]
    x, gain = torch.randn(1, key.inputs, device=bench.device), torch.ones(key.inputs, device=bench.device)
    found: dict[vector.VectorTiles, float] = {}
    for tiles in CANDIDATES if bench.settings.on_gpu else CANDIDATES[:2]:
        vector.TILES[key] = tiles
        seconds = bench.seconds(lambda: [_run(x, w, gain, key) for w in weights], repeats=5, warm=2)
        found[tiles] = copies * rows * key.inputs * weights[0].element_size() / seconds
    library = bench.seconds(
        lambda: [torch.nn.functional.linear(x.to(bench.dtype), w) for w in weights], repeats=5, warm=2
    )
    best = max(found, key=found.__getitem__)
    vector.TILES[key] = best
    rates = ", ".join(f"{t.outputs}x{t.inputs}/{t.warps} {rate / 1e12:.2f}" for t, rate in found.items())
    theirs = copies * rows * key.inputs * weights[0].element_size() / library
    yield {"work": f"{name}: {key}", "value": f"best {best}; TB/s: {rates}; the library {theirs / 1e12:.2f}"}


def _run(x: torch.Tensor, w: torch.Tensor, gain: torch.Tensor, key: vector.ProductKey) -> torch.Tensor:
    if key.gated:
        return vector.gated_product(x, w, gain, "silu", w.dtype, eps=1e-5)
    return vector.product(x, w, w.dtype, gain=gain, eps=1e-5)


def _decode(bench: Bench, name: str, spec: DecoderSpec) -> Iterator[Row]:
    steps = bench.sizes.steps
    options = LoadOptions(n_blocks=-(-(64 + steps + 8) // BLOCK_SIZE), max_rows=64, max_logit_rows=64)
    for label, early in (("", False), (", early launch", True)) if bench.settings.on_gpu else (("", False),):
        runner = random_runner(spec, options, replace(bench.settings, early=early))
        seconds = decode_seconds(runner, 1, 64, steps)
        yield {"work": f"{name}: a step with the best tiles{label}", "value": f"{1e3 * seconds:.3f} ms"}
        runner.close()
        bench.tidy()
