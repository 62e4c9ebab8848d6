from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend import reference
from sagellm_backend.base import LoadOptions, RowSampling, StepBatch
from sagellm_backend.conformance import SequenceRun, run_batch
from sagellm_backend.conformance_specs import SPECS, random_ids, random_weights
from sagellm_backend.quant import dequantize, round_trip
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.reference_ops import Tiling, activate, attend, erf, rms_norm, rotate, route, softcap
from sagellm_backend.spec import ExpertSpec, RopeSpec
from sagellm_backend.tensors import Format
from sagellm_protocol.errors import UnsupportedError
from sagellm_protocol.sampling import SamplingParams

OPTIONS = LoadOptions(n_blocks=32, max_rows=512)
SPEC = SPECS["llama"]


def naive_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int, scale: float, window: int, cap: float
) -> np.ndarray:
    """Attention written out in float64, one query at a time."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for i in range(q.shape[0]):
        position = start + i
        low = max(0, position - window + 1) if window else 0
        for head in range(q.shape[1]):
            keys, values = (a[low : position + 1, head // group].astype(np.float64) for a in (k, v))
            scores = keys @ q[i, head].astype(np.float64) * scale
            if cap:
                scores = cap * np.tanh(scores / cap)
            e = np.exp(scores - scores.max())
            out[i, head] = (e / e.sum()) @ values
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 600),
    st.integers(1, 50),
    st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 1)]),
    st.sampled_from([0, 1, 5, 100, 300]),
    st.sampled_from([0.0, 3.0]),
    st.integers(0, 2**31),
)
def test_paged_attention_equals_the_definition(
    start: int, rows: int, heads: tuple[int, int], window: int, cap: float, seed: int
) -> None:
    """Attention over scattered blocks in spans equals the definition, for any start, window and head grouping."""
    rng = np.random.default_rng(seed)
    n, (h, kv) = start + rows, heads
    q = rng.standard_normal((rows, h, 8), dtype=np.float32)
    k, v = (rng.standard_normal((n, kv, 8), dtype=np.float32) for _ in range(2))
    n_blocks = -(-n // 16)
    table = rng.permutation(n_blocks + 3)[:n_blocks].astype(np.int32)
    # What lies behind the sequence's end in its last block must not matter.
    pages = [np.full((n_blocks + 3, 16, kv, 8), np.nan, np.float32) for _ in range(2)]
    at = np.arange(n)
    for page, source in zip(pages, (k, v), strict=True):
        page[table[at // 16], at % 16] = source
    got = attend(q, *pages, table, start, scale=0.3, window=window, cap=cap)
    np.testing.assert_allclose(got, naive_attention(q, k, v, start, 0.3, window, cap), atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=60), st.integers(0, 2**31))
def test_tiled_product_depends_on_nothing_but_the_row(positions: list[int], seed: int) -> None:
    """A row's product is right, and bit-equal alone and in any company."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(positions), 24), dtype=np.float32)
    weight = rng.standard_normal((10, 24), dtype=np.float32)
    where = np.array(positions)
    got = Tiling(where).linear(x, weight)
    np.testing.assert_allclose(got, x @ weight.T, atol=1e-4)
    for i in (0, len(positions) - 1):
        np.testing.assert_array_equal(Tiling(where[i : i + 1]).linear(x[i : i + 1], weight)[0], got[i])


def test_rope_layouts_are_permutations_of_each_other() -> None:
    """Interleaved rotation is half rotation of permuted dimensions, and the rest of a head stays."""
    x = np.random.default_rng(0).standard_normal((5, 2, 12), dtype=np.float32)
    positions = np.array([0, 1, 7, 100, 5000], np.int32)
    halves = RopeSpec(theta=100.0, dim=8)
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 9, 10, 11]
    want = rotate(x, positions, halves)[..., order]
    got = rotate(x[..., order], positions, msgspec.structs.replace(halves, layout="interleaved"))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[0], x[0][..., order])
    np.testing.assert_array_equal(want[..., 8:], x[..., 8:])


def test_rope_keeps_relative_positions() -> None:
    """The product of two rotated vectors depends on the distance of their positions alone."""
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 16), dtype=np.float32)
    rope = RopeSpec(theta=10000.0, dim=16)

    def product(a: int, b: int) -> float:
        return float((rotate(q, np.array([a], np.int32), rope) * rotate(k, np.array([b], np.int32), rope)).sum())

    assert product(9, 4) == pytest.approx(product(1009, 1004), abs=1e-4)


def test_activations_equal_their_definitions() -> None:
    """Activations equal their definitions and neither overflow nor warn at the ends."""
    x = np.array([-1e4, -3.0, -0.5, 0.0, 0.5, 3.0, 1e4], np.float32)
    y = x.astype(np.float64)
    with np.errstate(over="ignore"):
        silu = y / (1 + np.exp(-y))
    np.testing.assert_allclose(activate(x, "silu"), silu, rtol=1e-6)
    np.testing.assert_allclose(activate(x, "gelu")[2:5], [-0.15426877, 0.0, 0.34573123], rtol=1e-6)
    np.testing.assert_allclose(activate(x, "gelu_tanh")[2:5], [-0.15428599, 0.0, 0.34571401], rtol=1e-6)
    assert activate(x, "relu").tolist() == [0, 0, 0, 0, 0.5, 3.0, 1e4]
    np.testing.assert_allclose(activate(x, "tanh"), np.tanh(y), rtol=1e-6)


def test_erf_equals_the_library() -> None:
    """The rational error function is exact to 7e-8."""
    x = np.linspace(-6, 6, 2001)
    np.testing.assert_allclose(erf(x), [math.erf(v) for v in x], atol=7e-8)


def test_softcap_and_norm() -> None:
    """A soft cap bounds, 0 switches it off; a norm makes the mean square 1."""
    x = np.array([[-100.0, 0.0, 1.0, 100.0]], np.float32)
    np.testing.assert_allclose(softcap(x, 2.0), 2 * np.tanh(x / 2))
    assert softcap(x, 0.0) is x
    assert np.mean(np.square(rms_norm(x, np.ones(4, np.float32), 1e-6))) == pytest.approx(1, abs=1e-5)


def test_router_ties_go_to_the_lower_expert() -> None:
    """Equal router logits choose the lower expert; weights sum to 1 only if normalised."""
    logits = np.array([[1.0, 2.0, 2.0, 1.0]], np.float32)
    chosen, weights = route(logits, ExpertSpec(n_experts=4, top_k=3, d_ff=1))
    assert chosen.tolist() == [[1, 2, 0]]
    assert weights.sum() == pytest.approx(1)
    _, weights = route(logits, ExpertSpec(n_experts=4, top_k=2, d_ff=1, normalize=False))
    assert weights.sum() == pytest.approx(2 * np.e / (2 * np.e + 2))


@pytest.mark.parametrize(("quant", "fmt"), [("q4", Format.Q4_1), ("q8", Format.Q8_0), ("bf16", Format.BF16)])
def test_quantised_at_load(quant: str, fmt: Format) -> None:
    """`quant` computes with the matrices rounded to that format, norms untouched."""
    weights = random_weights(SPEC)
    rounded = {slot: t if len(t.shape) == 1 else t.of(round_trip(dequantize(t), fmt)) for slot, t in weights.items()}
    ids = random_ids(SPEC, 9)
    backend = ReferenceBackend()
    a = SequenceRun(backend.load(SPEC, weights, replace(OPTIONS, quant=quant)), [0]).feed(ids)
    b = SequenceRun(backend.load(SPEC, rounded, OPTIONS), [0]).feed(ids)
    np.testing.assert_array_equal(a, b)


def test_compact_kv_is_refused() -> None:
    """A compact KV cache is refused with what to do."""
    with pytest.raises(UnsupportedError, match="kv-dtype"):
        ReferenceBackend().load(SPEC, random_weights(SPEC), replace(OPTIONS, kv_dtype="int8"))


def test_threads_are_set_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of threads goes to numpy's BLAS; where that takes none, it is refused with what to do."""
    asked: list[int] = []
    monkeypatch.setattr(reference, "set_blas_threads", lambda count: not asked.append(count))
    ReferenceBackend().load(SPEC, random_weights(SPEC), replace(OPTIONS, threads=3))
    assert asked == [3]
    monkeypatch.setattr(reference, "set_blas_threads", lambda count: False)
    with pytest.raises(UnsupportedError, match="OPENBLAS_NUM_THREADS"):
        ReferenceBackend().load(SPEC, random_weights(SPEC), replace(OPTIONS, threads=3))


def test_openblas_of_this_process_is_found() -> None:
    """The OpenBLAS of numpy takes a number of threads, in a process of its own."""
    code = "import numpy; from sagellm_backend.blas import set_blas_threads as f; print(f(1))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if "openblas" in blas:
        assert out[0] == "True"


def test_limits_given_at_load_hold() -> None:
    """More rows or logit rows than announced at load are refused with both numbers."""
    runner = ReferenceBackend().load(SPEC, random_weights(SPEC), LoadOptions(n_blocks=4, max_rows=8, max_logit_rows=1))
    with pytest.raises(ValueError, match=r"9 rows is above max_rows = 8"):
        SequenceRun(runner, [0]).feed(random_ids(SPEC, 9))
    row = RowSampling(SamplingParams(temperature=0.0))
    with pytest.raises(ValueError, match=r"2 rows want logits, above max_logit_rows = 1"):
        run_batch([(SequenceRun(runner, [i]), [1]) for i in range(2)], [row, row])


def test_closed_runner_refuses_steps() -> None:
    """A step after close raises; the weights are gone."""
    runner = ReferenceBackend().load(SPEC, random_weights(SPEC), OPTIONS)
    assert runner.weight_bytes == sum(4 * int(np.prod(shape)) for shape in SPEC.slots().values())
    runner.close()
    assert runner.weight_bytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        SequenceRun(runner, [0]).feed([1])


def test_an_empty_step_does_nothing() -> None:
    """A batch without rows gives an empty result."""
    runner = ReferenceBackend().load(SPEC, random_weights(SPEC), OPTIONS)
    none = np.empty(0, np.int32)
    result = runner.step(StepBatch(none, none, none, np.empty((0, 1), np.int32), none, []))
    assert result.token_ids.size == 0


def test_prefill_memory_does_not_grow_with_the_context() -> None:
    """A chunk of prefill takes about as much memory at position 3,800 as at 0: attention runs span by span."""
    spec = msgspec.structs.replace(SPEC, context_length=4096)
    runner = ReferenceBackend().load(spec, random_weights(spec), LoadOptions(n_blocks=256, max_rows=256))
    run = SequenceRun(runner, range(256))
    peaks = []
    for _ in range(15):
        tracemalloc.start()
        run.feed(random_ids(spec, 256))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[-1] < 1.5 * peaks[0]
