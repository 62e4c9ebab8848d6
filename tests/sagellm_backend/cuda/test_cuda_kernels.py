"""Triton kernels under the interpreter against the same operation in plain torch.

Products in bfloat16 are left to a GPU: the interpreter computes with their bits as if they were integers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
pytest.importorskip("triton", reason="triton is not installed: make test-cuda")

from cuda_numbers import close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.base import BLOCK_SIZE, RowSampling, StepBatch
from sagellm_backend.cuda.matrix import Matrix, to_fp8, to_q4, to_q8
from sagellm_backend.cuda.ops import AttentionShape, Rotation, TorchOps
from sagellm_backend.cuda.plan import DeviceStep, plan_step, upload
from sagellm_backend.cuda.sampling_plan import stream_words
from sagellm_backend.cuda.triton_ops import TritonOps
from sagellm_backend.cuda.weights import Projection
from sagellm_backend.sampling import sample
from sagellm_protocol.sampling import SamplingParams

pytestmark = pytest.mark.cuda

TORCH = TorchOps(torch.float32)
TRITON = TritonOps(torch.float32, 2)
FIXED = TritonOps(torch.float32, 2, invariant=True)
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)


MAKERS = {"dense": lambda v: Matrix("dense", v), "q8": to_q8, "q4": to_q4, "fp8": to_fp8}


@few
@given(seeds, st.integers(1, 5), st.sampled_from([32, 96, 130]), st.booleans(), st.booleans(), st.booleans())
def test_residual_norm(seed: int, rows: int, cols: int, branch: bool, post: bool, norm: bool) -> None:
    """Addition and both norms, each there or not, give torch's stream and state."""
    x, b = normal(seed, rows, cols), normal(seed + 1, rows, cols) if branch else None
    weights = [normal(seed + 2 + i, cols) if there else None for i, there in enumerate((post and branch, norm))]
    want = TORCH.residual_norm(x.clone(), b, *weights, 1e-5, 0.4)
    got = TRITON.residual_norm(x.clone(), b, *weights, 1e-5, 0.4)
    for left, right in zip(got, want, strict=True):
        close(left, right)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_activations(kind: str) -> None:
    """Each activation equals torch's, far tails included."""
    gate_up = torch.cat([torch.linspace(-30, 30, 700).view(7, 100), normal(1, 7, 100)], dim=1)
    close(TRITON.activate(gate_up, kind), TORCH.activate(gate_up, kind), 1e-6)


@pytest.mark.parametrize("kind", MAKERS)
@few
@given(seeds, st.integers(1, 6), st.sampled_from([32, 96]))
def test_embedding(kind: str, seed: int, rows: int, cols: int) -> None:
    """Rows of a table in every packing equal torch's, times the factor."""
    table = MAKERS[kind](normal(seed, 11, cols))
    tokens = torch.randint(0, 11, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    close(TRITON.embed(table, tokens, 3.0), TORCH.embed(table, tokens, 3.0), 1e-6)


@pytest.mark.parametrize("kind", MAKERS)
@few
@given(seeds, st.sampled_from([1, 3, 16, 17, 70]), st.sampled_from([5, 64, 100]), st.sampled_from([32, 96, 160]))
def test_products(kind: str, seed: int, rows: int, outputs: int, inputs: int) -> None:
    """Products with every kind of matrix, with and without a bias, in tiles for any number of rows, equal torch's."""
    x, matrix = normal(seed, rows, inputs), MAKERS[kind](normal(seed + 1, outputs, inputs))
    for bias in (None, normal(seed + 2, outputs)):
        projection = Projection((matrix,), (("0.o", outputs),), bias)
        want = TORCH.linear(x, projection)
        close(TRITON.linear(x, projection), want)
        close(FIXED.linear(x, projection), want)
    close(TRITON.matmul(x, matrix, exact=True), TORCH.matmul(x, matrix, exact=True))


def test_products_in_half_precision() -> None:
    """float16 operands are summed in float32."""
    x, w = normal(0, 5, 256).half(), Matrix("dense", normal(1, 33, 256).half())
    want = x.float() @ w.data.float().T
    close(TritonOps(torch.float16, 1).matmul(x, w, exact=True), want)
    close(TritonOps(torch.float16, 1, invariant=True).matmul(x, w), want, 1e-3)


@pytest.mark.parametrize("kind", MAKERS)
@few
@given(seeds, st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_grouped_products(kind: str, seed: int, products: int, matrices: int, gaps: bool) -> None:
    """Each product uses the matrix that was chosen for it, and is zero where none was."""
    rng = np.random.default_rng(seed)
    x, stack = normal(seed, 7, 64), MAKERS[kind](normal(seed + 1, matrices, 24, 64))
    source = torch.from_numpy(rng.integers(0, 7, products))
    chosen = torch.from_numpy(rng.integers(-1 if gaps else 0, matrices, products))
    want = TORCH.grouped(x, stack, TORCH.routes(source, chosen, matrices))
    for ops in (TRITON, FIXED):
        close(ops.grouped(x, stack, ops.routes(source, chosen, matrices)), want)


def paged(seed: int, lengths: list[int], starts: list[int], n_blocks: int = 24) -> tuple[DeviceStep, DeviceStep]:
    """A batch on shuffled blocks, laid out for torch and for Triton."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(n_blocks).tolist()
    ends = [a + b for a, b in zip(starts, lengths, strict=True)]
    tables = np.full((len(lengths), max(-(-end // BLOCK_SIZE) for end in ends)), -1, np.int32)
    for table, end in zip(tables, ends, strict=True):
        for i in range(-(-end // BLOCK_SIZE)):
            table[i] = free.pop()
    batch = StepBatch(
        token_ids=np.zeros(sum(lengths), np.int32),
        starts=np.array(starts, np.int32),
        lengths=np.array(lengths, np.int32),
        block_tables=tables,
        logit_rows=np.zeros(0, np.int32),
        sampling=[],
    )
    return tuple(upload(plan_step(batch, ops.short_rows, ops.long_rows), "cpu") for ops in (TORCH, TRITON))


@few
@given(
    seeds,
    st.lists(st.tuples(st.sampled_from([1, 1, 2, 9, 40]), st.integers(0, 50)), min_size=1, max_size=4),
    st.sampled_from([(4, 2, 32), (4, 1, 16), (6, 2, 24)]),
    st.sampled_from([0, 7, 24]),
    st.sampled_from([0.0, 3.0]),
)
def test_attention(
    seed: int, parts: list[tuple[int, int]], heads: tuple[int, int, int], window: int, cap: float
) -> None:
    """Decode rows with split keys and chunks of prompts, windowed, capped, grouped, equal torch's softmax over the same pages."""
    n_heads, kv_heads, head_dim = heads
    lengths, starts = [n for n, _ in parts], [s for _, s in parts]
    shape = AttentionShape(n_heads, kv_heads, head_dim, 1 / math.sqrt(head_dim), window, cap)
    cache = normal(seed, 24, 3, 2, kv_heads, BLOCK_SIZE, head_dim)[:, 1]
    q = normal(seed + 1, sum(lengths), n_heads, head_dim)
    plain, laid_out = paged(seed, lengths, starts)
    want = TORCH.attend(q, plain, cache, shape)
    for invariant in (False, True):
        ops = TritonOps(torch.float32, n_heads // kv_heads, invariant=invariant)
        batch_tiles = plan_like(laid_out, ops)
        close(ops.attend(q, batch_tiles, cache, shape), want)


def plan_like(step: DeviceStep, ops: TorchOps) -> DeviceStep:
    """The same batch in the tiles of other operations."""
    batch = StepBatch(
        token_ids=step.tokens.numpy(),
        starts=step.starts.numpy(),
        lengths=step.lengths.numpy(),
        block_tables=step.tables.numpy(),
        logit_rows=step.logit_rows.numpy(),
        sampling=[],
    )
    return upload(plan_step(batch, ops.short_rows, ops.long_rows, ops.prompt_rows), "cpu")


@few
@given(seeds, st.booleans(), st.booleans(), st.sampled_from([(32, 16), (32, 8), (24, 12)]))
def test_rotation_and_store(seed: int, interleaved: bool, norms: bool, dims: tuple[int, int]) -> None:
    """Q is normed and rotated, k too and written with v to its slot; nothing else in the cache changes."""
    head_dim, half = dims
    step, _ = paged(seed, [1, 5], [18, 3])
    rows, shape = step.tokens.numel(), AttentionShape(4, 2, head_dim, 1.0, 0, 0.0)
    qkv = normal(seed, rows, 8 * head_dim)
    angles = normal(seed + 1, rows, half)
    rotation = Rotation(angles.cos(), angles.sin(), interleaved)
    weights = (normal(seed + 2, head_dim), normal(seed + 3, head_dim)) if norms else None
    before = normal(seed + 4, 24, 2, 2, 2, BLOCK_SIZE, head_dim)
    caches = [before.clone()[:, 1] for _ in range(2)]
    got, want = (
        ops.rotate_and_store(qkv, step, rotation, cache, shape, weights, 1e-5)
        for ops, cache in zip((TRITON, TORCH), caches, strict=True)
    )
    close(got, want)
    close(caches[0], caches[1])
    changed = (caches[0] != before[:, 1]).flatten(1).any(dim=1)
    assert set(torch.nonzero(changed).flatten().tolist()) == set((step.slots // BLOCK_SIZE).tolist())


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_prompts_by_gathered_keys(heads: tuple[int, int], start: int) -> None:
    """A long prompt and the second part of one, beside a decoding sequence and a short prompt, equal torch's softmax."""
    n_heads, kv_heads = heads
    shape = AttentionShape(n_heads, kv_heads, 32, 1 / math.sqrt(32), 0, 0.0)
    ops = TritonOps(torch.float32, n_heads // kv_heads, gather_prompts=True)
    lengths, starts = [1, 300, 9], [40, start, 20]
    plain, _ = paged(3, lengths, starts, n_blocks=64)
    cache, q = normal(4, 64, 2, kv_heads, BLOCK_SIZE, 32), normal(5, sum(lengths), n_heads, 32)
    mine = plan_like(plain, ops)
    assert [prompt.sequence for prompt in mine.prompts] == [1]
    with torch.inference_mode():
        close(ops.attend(q, mine, cache, shape), TORCH.attend(q, plain, cache, shape))


def test_tokens_that_only_the_device_knows() -> None:
    """Negative tokens become what was drawn before, or 0 where nothing could be."""
    tokens, last = torch.tensor([7, -1, -3, -2, 0], dtype=torch.int32), torch.tensor([5, 6, -1], dtype=torch.int32)
    for ops in (TORCH, TRITON):
        assert ops.follow(tokens, last).tolist() == [7, 5, 0, 6, 0]


def test_angles() -> None:
    """Cosines and sines of far positions are those of float64."""
    positions, frequencies = (
        torch.tensor([0, 1, 77, 131071], dtype=torch.int32),
        1e4 ** -torch.linspace(0, 1, 24).double(),
    )
    for got, want in zip(
        TRITON.angles(positions, frequencies, 1.2), TORCH.angles(positions, frequencies, 1.2), strict=True
    ):
        close(got, want, 1e-7)


@few
@given(seeds, st.sampled_from([5, 33, 1100, 3000]), st.floats(0.05, 2.0))
def test_plain_draws_are_the_references(seed: int, vocab: int, temperature: float) -> None:
    """Weights in chunks, summed as integers, draw the very token of the reference's definition, for any seed."""
    logits = normal(seed, 4, vocab) * 4
    logits[1, ::2] = float("-inf")
    logits[3] = float("-inf")
    rows = [RowSampling(SamplingParams(temperature=temperature), seed=seed - i, position=i) for i in range(4)]
    words = torch.from_numpy(stream_words([r.seed for r in rows], [r.position for r in rows]))
    scale = torch.full((4,), 1.4426950408889634 / temperature, dtype=torch.float64)
    best = logits.max(dim=1).values
    want = [sample(row.numpy(), how) for row, how in zip(logits, rows, strict=True)]
    for ops in (TORCH, TRITON):
        assert ops.draw_plain(logits, best, scale, words).tolist() == want


@few
@given(seeds, st.sampled_from([31, 64, 1500]))
def test_masks(seed: int, vocab: int) -> None:
    """Bits that are 0 exclude their token, in the rows that have a mask and in no other."""
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2**32, (2, -(-vocab // 32)), dtype=np.uint32)
    rows = torch.tensor([3, 1])
    outs = []
    for ops in (TORCH, TRITON):
        z = normal(seed, 4, vocab)
        ops.apply_masks(z, rows, torch.from_numpy(masks.view(np.int32).copy()))
        outs.append(z)
    assert torch.equal(outs[0], outs[1])
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab]
    assert torch.equal(torch.isinf(outs[0][rows]), torch.from_numpy(bits == 0))
    assert torch.isfinite(outs[0][[0, 2]]).all()
