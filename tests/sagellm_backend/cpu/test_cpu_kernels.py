"""Each kernel agrees with its plain twin on random shapes, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.base import RowSampling
from sagellm_backend.quant import dequantize, quantize
from sagellm_backend.sampling import report, sample, stream_word
from sagellm_backend.tensors import Format, Tensor
from sagellm_protocol.sampling import SamplingParams

_native = pytest.importorskip("sagellm_backend.cpu._native", reason="built without the extension")

ISAS = st.sampled_from(_native.supported_isas())
SEEDS = st.integers(0, 2**32 - 1)
PACKED = {
    "Q4": Format.Q4_0,
    "Q4M": Format.Q4_1,
    "Q8": Format.Q8_0,
    "Q8M": Format.Q5_1,
    "BF16": Format.BF16,
    "F32": Format.F32,
}
QUICK = settings(max_examples=40, deadline=None)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def matrix(packed: str, seed: int, outputs: int, inputs: int) -> Tensor:
    """Weights of the format that `packed` keeps as they are."""
    if packed == "Q8M":  # Q5_1 by hand: half scale, half minimum, 32 fifth bits, 16 bytes of nibbles
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (outputs * inputs // 32, 24), dtype=np.uint8)
        blocks[:, :4] = rng.uniform(-0.5, 0.5, (blocks.shape[0], 2)).astype(np.float16).view(np.uint8)
        return Tensor((outputs, inputs), Format.Q5_1, blocks.reshape(-1))
    return quantize(normal(seed, outputs, inputs), PACKED[packed])


@QUICK
@given(ISAS, st.sampled_from(sorted(PACKED)), SEEDS, st.integers(1, 20), st.integers(1, 70), st.integers(1, 6))
def test_matrix_products_equal_the_twin(isa: str, packed: str, seed: int, rows: int, outputs: int, groups: int) -> None:
    """Any rows times any packed matrix is the exact product up to float32 rounding."""
    tensor = matrix(packed, seed, outputs, groups * 32)
    x = normal(seed + 1, rows, groups * 32)
    got, want = _native.Probe(isa).gemm(packed, tensor.format.name, tensor.data, outputs, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())) * groups)


@QUICK
@given(ISAS, st.sampled_from(["Q8", "Q4M", "BF16", "F32"]), SEEDS, st.integers(1, 100), st.integers(1, 40))
def test_inputs_need_not_fill_groups(isa: str, packed: str, seed: int, inputs: int, outputs: int) -> None:
    """Weights quantised at load may have rows of any length."""
    tensor = Tensor.of(normal(seed, outputs, inputs))
    got, want = _native.Probe(isa).gemm(packed, "F32", tensor.data, outputs, normal(seed + 1, 3, inputs))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, float(np.abs(want).max())))


@QUICK
@given(ISAS, st.sampled_from(sorted(PACKED)), SEEDS, st.integers(2, 20))
def test_a_row_does_not_depend_on_the_others(isa: str, packed: str, seed: int, rows: int) -> None:
    """Each row of a product has the same bits alone and among others."""
    tensor = matrix(packed, seed, 40, 96)
    x = normal(seed + 1, rows, 96)
    probe = _native.Probe(isa)
    together, _ = probe.gemm(packed, tensor.format.name, tensor.data, 40, x)
    for row in range(rows):
        alone, _ = probe.gemm(packed, tensor.format.name, tensor.data, 40, x[row : row + 1])
        np.testing.assert_array_equal(alone[0], together[row])


@QUICK
@given(ISAS, st.sampled_from(["Q4", "Q4M", "Q8", "Q8M"]), SEEDS, st.integers(1, 70), st.integers(1, 6))
def test_no_row_of_a_panel_is_longer_than_said(isa: str, packed: str, seed: int, outputs: int, groups: int) -> None:
    """The bound of a panel's norms holds, and is within eight times the greatest; 5 bits in 8 are taken for 7."""
    tensor = matrix(packed, seed, outputs, groups * 32)
    bounds = _native.Probe(isa).panel_norms(packed, tensor.format.name, tensor.data, outputs, groups * 32)
    norms = np.linalg.norm(dequantize(tensor), axis=1)
    for panel, bound in enumerate(bounds):
        most = norms[panel * 32 : panel * 32 + 32].max()
        assert most <= bound <= (32 if packed == "Q8M" else 8) * most


@QUICK
@given(ISAS, SEEDS, st.integers(1, 300))
def test_row_operations_equal_the_twin(isa: str, seed: int, n: int) -> None:
    """RMSNorm, gate activations and the soft cap are exact to a few units in the last place."""
    probe, x, y = _native.Probe(isa), normal(seed, n) * 4, normal(seed + 1, n)
    np.testing.assert_allclose(*probe.rms_norm(x, y, 1e-6), rtol=3e-5, atol=1e-6)
    padded = np.resize(x, -(-n // 16) * 16).astype(np.float32)
    for kind in range(3):
        np.testing.assert_allclose(*probe.activate(kind, padded, padded), rtol=1e-5, atol=3e-6)
    np.testing.assert_allclose(*probe.softcap(padded, 5.0), rtol=1e-5, atol=1e-6)


@QUICK
@given(ISAS, SEEDS, st.integers(1, 70), st.booleans())
def test_rotation_equals_the_twin(isa: str, seed: int, half: int, interleaved: bool) -> None:
    """Rotary embedding turns the first dimensions of a head and leaves the rest."""
    angles = normal(seed, half) * 10
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)
    got, want = _native.Probe(isa).rope(normal(seed, 2 * half + 3), cos_sin, interleaved)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    ISAS,
    st.sampled_from([("f32", 2e-5), ("bf16", 4e-2), ("int8", 6e-2)]),
    SEEDS,
    st.sampled_from([2, 16, 40, 64, 96, 128, 256]),
    st.integers(1, 700),
    st.integers(1, 32),
    st.sampled_from([0, 1, 7, 16, 300]),
    st.sampled_from([0.0, 4.0]),
)
def test_attention_equals_the_twin(
    isa: str, kv: tuple[str, float], seed: int, dim: int, tokens: int, lanes: int, window: int, cap: float
) -> None:
    """Paged attention is softmax attention, for any head size, window, soft cap and place of the blocks."""
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.integers(max(0, tokens - 20), tokens, lanes)).astype(np.int32)
    blocks = rng.permutation(-(-tokens // 16) + 3).astype(np.int32)
    q, k, v = (normal(seed + i, n, dim) for i, n in enumerate((lanes, tokens, tokens)))
    got, want = _native.Probe(isa).attention(kv[0], q, k, v, positions, blocks, dim**-0.5, cap, window)
    np.testing.assert_allclose(got, want, rtol=0, atol=kv[1])


@QUICK
@given(ISAS, st.sampled_from(["f32", "bf16", "int8"]), SEEDS, st.integers(2, 32), st.sampled_from([0, 9, 300]))
def test_a_query_does_not_depend_on_the_others(isa: str, kv: str, seed: int, lanes: int, window: int) -> None:
    """Each query vector's attention has the same bits alone and among others of its KV head."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(20, 700))
    positions = np.sort(rng.integers(max(0, tokens - 300), tokens, lanes)).astype(np.int32)
    blocks = rng.permutation(-(-tokens // 16)).astype(np.int32)
    q, k, v = (normal(seed + i, n, 48) for i, n in enumerate((lanes, tokens, tokens)))
    probe = _native.Probe(isa)
    together, _ = probe.attention(kv, q, k, v, positions, blocks, 0.2, 0.0, window)
    for lane in range(lanes):
        one = slice(lane, lane + 1)
        alone, _ = probe.attention(kv, q[one], k, v, positions[one], blocks, 0.2, 0.0, window)
        np.testing.assert_array_equal(alone, together.reshape(lanes, 48)[lane])


@QUICK
@given(SEEDS, st.integers(1, 40), st.integers(1, 100), st.integers(1, 70), st.sampled_from([1.0, 0.25]))
def test_low_rank_updates_are_products(seed: int, rank: int, inputs: int, outputs: int, factor: float) -> None:
    """An adapter adds factor · B · A · x for any rank and size."""
    x, a, b = normal(seed, inputs), normal(seed + 1, rank, inputs), normal(seed + 2, outputs, rank)
    got = _native.Probe("portable").low_rank(x, a, b, factor)
    np.testing.assert_allclose(got, factor * (b @ (a @ x)), rtol=0, atol=1e-5 * rank * inputs)


@settings(max_examples=100, deadline=None)
@given(
    ISAS,
    SEEDS,
    st.integers(1, 600),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 5, 200]),
        top_p=st.sampled_from([1.0, 0.9, 0.2]),
        min_p=st.sampled_from([0.0, 0.1]),
        typical_p=st.sampled_from([1.0, 0.7]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, -0.25]),
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**40),
)
def test_draws_are_those_of_the_reference(
    isa: str, seed: int, vocab: int, params: SamplingParams, stream: int, position: int
) -> None:
    """For the same logits the native sampler draws the reference's token; ties and excluded logits included."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal(vocab) * 3, 1).astype(np.float32)
    logits[rng.random(vocab) < 0.05] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32))
    history = rng.integers(0, vocab, 30).astype(np.int32)
    row = RowSampling(params=params, seed=stream, position=position, history=history, n_prompt=10)
    assert _native.Probe(isa).sample(logits, row) == sample(logits, row)


@QUICK
@given(ISAS, SEEDS, st.integers(1, 600), st.integers(0, 20))
def test_log_probabilities_are_those_of_the_reference(isa: str, seed: int, vocab: int, count: int) -> None:
    """Log-probabilities and the order of the alternatives agree, ties included."""
    logits = np.round(normal(seed, vocab) * 5, 1)
    got, ids, values = _native.Probe(isa).report(logits, vocab // 2, count)
    want, want_ids, want_values = report(logits, vocab // 2, count)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(values, want_values, atol=1e-5)
    assert got == pytest.approx(want, abs=1e-5)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1))
def test_random_words_are_the_streams(seed: int, position: int) -> None:
    """The counter-based generator gives the documented words."""
    assert _native.stream_word(seed % 2**64, position) == stream_word(seed, position)
