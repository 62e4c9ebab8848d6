"""Decode steps of one or two sequences: products with what stands before and after them, and attention from raw projections."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
pytest.importorskip("triton", reason="triton is not installed: make test-cuda")

from cuda_numbers import close, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, RowSampling, StepBatch
from sagellm_backend.conformance import SequenceRun
from sagellm_backend.conformance_specs import SPECS, random_ids, random_weights
from sagellm_backend.cuda import CudaBackend
from sagellm_backend.cuda.kernels import vector
from sagellm_backend.cuda.kernels.row_attention import RowAttention
from sagellm_backend.cuda.ops import AttentionShape, Rotation, TorchOps
from sagellm_backend.cuda.plan import DeviceStep, plan_step, upload
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.single import SingleRows
from sagellm_backend.quant import dequantize, quantize
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_backend.tensors import Format
from sagellm_protocol.sampling import SamplingParams

pytestmark = pytest.mark.cuda

TORCH = TorchOps(torch.float32)
SETTINGS = CudaSettings(device="cpu", dtype="f32", kernels="triton")
OPTIONS = LoadOptions(n_blocks=16, max_rows=64, max_logit_rows=16)
few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**31 - 1)


@few
@given(
    seeds, st.integers(1, 2), st.sampled_from([5, 64]), st.sampled_from([32, 96, 1500]), st.booleans(), st.booleans()
)
def test_products_with_their_norm(seed: int, rows: int, outputs: int, inputs: int, norm: bool, bias: bool) -> None:
    """A product whose norm is folded in, with a bias or not, plain, gated and added to the residual, equals torch's."""
    x, w = normal(seed, rows, inputs), normal(seed + 1, outputs, inputs)
    gain = normal(seed + 2, inputs).abs() + 0.1
    b = normal(seed + 3, outputs) if bias else None
    normed = TORCH.norm(x, gain, 1e-5)
    want = (normed if norm else x) @ w.T + (0 if b is None else b)
    close(vector.product(x, w, torch.float32, gain=gain if norm else None, bias=b, eps=1e-5), want)
    residual = normal(seed + 4, rows, outputs)
    added = residual.clone()
    vector.add_product(added, x, w, 0.5, bias=b)
    close(added, residual + 0.5 * (x @ w.T + (0 if b is None else b)))
    gate_up = normal(seed + 5, 2 * outputs, inputs) / math.sqrt(inputs)
    for kind in ("silu", "gelu_tanh", "gelu"):
        got = vector.gated_product(x, gate_up, gain, kind, torch.float32, eps=1e-5)  # type: ignore[arg-type]
        close(got, TORCH.activate(normed @ gate_up.T, kind))  # type: ignore[arg-type]


def decode_step(starts: list[int]) -> DeviceStep:
    """One row of each sequence, on shuffled blocks."""
    free = np.random.default_rng(1).permutation(120).tolist()
    tables = np.full((len(starts), max(s // BLOCK_SIZE + 1 for s in starts)), -1, np.int32)
    for table, start in zip(tables, starts, strict=True):
        table[: start // BLOCK_SIZE + 1] = [free.pop() for _ in range(start // BLOCK_SIZE + 1)]
    batch = StepBatch(
        token_ids=np.zeros(len(starts), np.int32),
        starts=np.array(starts, np.int32),
        lengths=np.ones(len(starts), np.int32),
        block_tables=tables,
        logit_rows=np.arange(len(starts), dtype=np.int32),
        sampling=[RowSampling(SamplingParams())] * len(starts),
    )
    return upload(plan_step(batch, 1, 0), "cpu")


@pytest.mark.parametrize(
    ("heads", "half", "interleaved", "norm", "window", "cap", "starts"),
    [
        ((4, 2, 32), 16, False, True, 0, 0.0, [700, 3]),
        ((4, 1, 16), 8, True, False, 0, 3.0, [0, 129]),
        ((6, 2, 24), 8, False, True, 200, 0.0, [600, 150]),
        ((4, 4, 32), 16, True, False, 0, 0.0, [520]),
    ],
)
def test_attention_of_one_row(
    heads: tuple[int, int, int],
    half: int,
    interleaved: bool,
    norm: bool,
    window: int,
    cap: float,
    starts: list[int],
) -> None:
    """Norm, rotation, the write of k and v and attention in one launch, keys divided or not, equal the steps one by one.

    A second launch finds the counters as the first did.
    """
    n_heads, kv_heads, head_dim = heads
    step, rows = decode_step(starts), len(starts)
    shape = AttentionShape(n_heads, kv_heads, head_dim, 1 / math.sqrt(head_dim), window, cap)
    before = normal(2, 120, 2, 2, kv_heads, BLOCK_SIZE, head_dim)
    caches = [before.clone()[:, 1] for _ in range(2)]
    qkv, angles = normal(3, rows, (n_heads + 2 * kv_heads) * head_dim), normal(4, rows, half)
    rotation = Rotation(angles.cos(), angles.sin(), interleaved)
    norms = (normal(5, head_dim), normal(6, head_dim)) if norm else None
    q = TORCH.rotate_and_store(qkv, step, rotation, caches[0], shape, norms, 1e-5)
    want = TORCH.attend(q, step, caches[0], shape)
    attention = RowAttention(2, n_heads, kv_heads, head_dim, qkv.device, early=False)
    for _ in range(2):
        got = attention.attend(
            qkv, step, rotation, caches[1], norms, 1e-5, scale=shape.scale, window=window, cap=cap
        )  # fmt: skip
        close(got, want)
        close(caches[1], caches[0])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "partial", "mistral", "granite"])
def test_single_rows_give_the_references_logits(name: str) -> None:
    """Decode steps of one sequence, which go the short way, give the reference's logits after a prompt that does not."""
    spec = SPECS[name]
    weights, ids = random_weights(spec), random_ids(spec, 24)
    runners = [backend.load(spec, weights, OPTIONS) for backend in (CudaBackend(SETTINGS), ReferenceBackend())]
    assert isinstance(runners[0]._single, SingleRows)
    runs = [SequenceRun(runner, [3, 1]) for runner in runners]
    for part in (ids[:20], *([token] for token in ids[20:])):
        got, want = (run.feed(part) for run in runs)
        assert np.abs(log_softmax(got) - log_softmax(want)).max() < 1e-3


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "mixtral"])
def test_other_models_go_the_usual_way(name: str) -> None:
    """Norms behind the blocks, a norm of whole projections, experts and packed weights have no short way."""
    spec = SPECS[name]
    assert CudaBackend(SETTINGS).load(spec, random_weights(spec), OPTIONS)._single is None
    spec = SPECS["llama"]
    packed = {
        s: quantize(dequantize(t), Format.Q8_0) if len(t.shape) > 1 else t for s, t in random_weights(spec).items()
    }
    assert CudaBackend(SETTINGS).load(spec, packed, OPTIONS)._single is None
    fixed = replace(SETTINGS, invariant=True)
    assert CudaBackend(fixed).load(spec, random_weights(spec), OPTIONS)._single is None


def test_replayed_single_rows_follow_what_was_drawn() -> None:
    """From graphs, with tokens that only the device knows, one and two sequences draw what plain steps draw."""
    spec = SPECS["qwen3"]
    runners = [CudaBackend(SETTINGS).load(spec, random_weights(spec), OPTIONS) for _ in range(2)]
    runners[1].make_graphs(lambda run: run)
    row = RowSampling(SamplingParams(temperature=0.0))

    def batch(tokens: list[int], start: int) -> StepBatch:
        n = len(tokens)
        return StepBatch(
            token_ids=np.array(tokens, np.int32),
            starts=np.full(n, start, np.int32),
            lengths=np.ones(n, np.int32),
            block_tables=np.arange(n, dtype=np.int32)[:, None],
            logit_rows=np.arange(n, dtype=np.int32),
            sampling=[row] * n,
        )

    texts: list[list[list[int]]] = [[], []]
    for text, runner in zip(texts, runners, strict=True):
        pending = runner.launch(batch([5, 9], 0))
        text.append(pending.result().token_ids.tolist())
        for start in range(1, 5):
            following = runner.launch(batch([-1, -2] if start < 3 else [-1], start), pending)
            text.append(following.result().token_ids.tolist())
            pending = following
    assert texts[0] == texts[1]
    assert runners[1].single_graphs is not None
    assert runners[1].single_graphs.captured == (1, 2)
    assert runners[1].single_graphs.replays == 3
