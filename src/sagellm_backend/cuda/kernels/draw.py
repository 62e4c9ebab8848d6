"""Plain sampling (temperature alone) in two passes over the logits, and masks of grammars.

The arithmetic is docs/design/0030-sampling-stream.md's: f64, no fused multiply-add (``enable_fp_fusion=False``), integer sums.
Coefficients come from memory, since a literal in a kernel may be taken as f32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sagellm_backend.sampling import EXP2_COEFFICIENTS

__all__ = ["apply_masks", "chunk_sums", "pick_in_chunk"]

CHUNK = 1024
"""Logits whose weights are summed together."""


@triton.jit
def _weights(z, best, scale, coefficients, live, N_COEFFICIENTS: tl.constexpr):
    """floor(2^x · 2^44) with x = (z - best) · scale."""
    # An excluded logit, of which all of a row may be, takes no part in the arithmetic.
    live = live & (z > float("-inf"))
    x = (tl.where(live, z, 0.0).to(tl.float64) - tl.where(live, best, 0.0).to(tl.float64)) * scale
    live = live & (x >= -45.0)
    x = tl.where(live, x, 0.0)
    # Adding and taking away 1.5 · 2^52 rounds to the nearest integer, ties to even.
    n = (x + 6755399441055744.0) - 6755399441055744.0
    f = x - n
    p = tl.zeros_like(f) + tl.load(coefficients + N_COEFFICIENTS - 1)
    for k in tl.static_range(1, N_COEFFICIENTS):
        p = p * f
        p = p + tl.load(coefficients + N_COEFFICIENTS - 1 - k)
    power = ((n.to(tl.int64) + 1067) << 52).to(tl.float64, bitcast=True)
    return tl.where(live, (p * power).to(tl.int64), 0)


@triton.jit
def _chunk_sums(z, best, scale, coefficients, sums, vocab, n_chunks, N_COEFFICIENTS: tl.constexpr, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    live = at < vocab
    logits = tl.load(z + row * vocab + at, live, float("-inf"))
    weights = _weights(logits, tl.load(best + row), tl.load(scale + row), coefficients, live, N_COEFFICIENTS)
    tl.store(sums + row * n_chunks + chunk, tl.sum(weights, 0))


@triton.jit
def _pick(z, best, scale, coefficients, chunks, rest, out, vocab, N_COEFFICIENTS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.load(chunks + row)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    live = at < vocab
    logits = tl.load(z + row * vocab + at, live, float("-inf"))
    weights = _weights(logits, tl.load(best + row), tl.load(scale + row), coefficients, live, N_COEFFICIENTS)
    passed = tl.cumsum(weights, 0) <= tl.load(rest + row)
    tl.store(out + row, chunk * CHUNK + tl.sum(passed.to(tl.int64), 0))


@triton.jit
def _apply_masks(z, rows, masks, vocab, words, CHUNK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    live = token < vocab
    word = tl.load(masks + entry * words + token // 32, live, 0)
    excluded = ((word >> (token % 32)) & 1) == 0
    tl.store(z + row * vocab + token, float("-inf"), live & excluded)


def chunk_sums(z: torch.Tensor, best: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sums of the integer weights of every `CHUNK` logits: z f32 (n, vocab), best f32 (n,), scale f64 (n,) -> int64 (n, chunks)."""
    n, vocab = z.shape
    chunks = triton.cdiv(vocab, CHUNK)
    sums = torch.empty((n, chunks), dtype=torch.int64, device=z.device)
    table = _coefficients(z.device)
    _chunk_sums[(n, chunks)](
        z, best, scale, table, sums, vocab, chunks,
        N_COEFFICIENTS=table.numel(), CHUNK=CHUNK, enable_fp_fusion=False,
    )  # fmt: skip
    return sums


def pick_in_chunk(
    z: torch.Tensor, best: torch.Tensor, scale: torch.Tensor, chunks: torch.Tensor, rest: torch.Tensor
) -> torch.Tensor:
    """The first id of each row's chunk whose running sum within the chunk exceeds `rest`: int64 (n,)."""
    n, vocab = z.shape
    out = torch.empty(n, dtype=torch.int64, device=z.device)
    table = _coefficients(z.device)
    _pick[(n,)](
        z, best, scale, table, chunks, rest, out, vocab,
        N_COEFFICIENTS=table.numel(), CHUNK=CHUNK, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def apply_masks(z: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Set what a bit mask excludes to -inf, in place: row ``rows[i]`` (int64) of z by ``masks[i]``, int32 (m, words)."""
    vocab, words = z.shape[1], masks.shape[1]
    _apply_masks[(rows.numel(), triton.cdiv(vocab, CHUNK))](z, rows, masks, vocab, words, CHUNK=CHUNK)


_TABLES: dict[torch.device, torch.Tensor] = {}


def _coefficients(device: torch.device) -> torch.Tensor:
    if device not in _TABLES:
        _TABLES[device] = torch.tensor(EXP2_COEFFICIENTS, dtype=torch.float64, device=device)
    return _TABLES[device]
