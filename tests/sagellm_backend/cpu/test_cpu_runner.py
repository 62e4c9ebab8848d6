"""The runner: invariance to threads, quantisation at load, refusals, closing."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.base import LoadOptions, RowSampling, StepBatch
from sagellm_backend.conformance import SequenceRun
from sagellm_backend.conformance_specs import SPECS, random_ids, random_weights
from sagellm_backend.cpu import CpuBackend
from sagellm_backend.cpu.backend import ISA_VARIABLE
from sagellm_backend.quant import dequantize, quantize
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_backend.spec import DecoderSpec, ExpertSpec
from sagellm_backend.tensors import Format, Tensor
from sagellm_protocol.errors import UnsupportedError
from sagellm_protocol.sampling import SamplingParams

_native = pytest.importorskip("sagellm_backend.cpu._native", reason="built without the extension")

OPTIONS = LoadOptions(n_blocks=32, max_rows=128, max_logit_rows=16)
SPEC = SPECS["llama"]


def greedy_batch(n: int, spec: DecoderSpec, seed: int) -> StepBatch:
    """First tokens of n sequences."""
    return StepBatch(
        token_ids=np.array(random_ids(spec, n, seed=seed), np.int32),
        starts=np.zeros(n, np.int32),
        lengths=np.ones(n, np.int32),
        block_tables=np.arange(n, dtype=np.int32)[:, None],
        logit_rows=np.arange(n, dtype=np.int32),
        sampling=[RowSampling(SamplingParams(temperature=0.0))] * n,
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    """Logits after prefill and decode are the same for every number of threads."""
    ids = random_ids(SPEC, 70)
    out = []
    for count in (2, threads):
        runner = CpuBackend().load(SPEC, random_weights(SPEC), replace(OPTIONS, threads=count))
        run = SequenceRun(runner, range(6))
        out.append([run.feed(ids), run.feed([3]), run.feed([4])])
        assert runner.threads == count
        runner.close()
    np.testing.assert_array_equal(out[0], out[1])


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(_native.supported_isas()),
    st.sampled_from([Format.Q4_0, Format.Q4_1, Format.Q8_0]),
    st.integers(0, 1000),
)
def test_the_first_token_is_nearly_exact(isa: str, fmt: Format, seed: int) -> None:
    """Repeated, a token has ten times the error that it has at the start, where activations keep two planes of int8."""
    floats = {slot: dequantize(tensor) for slot, tensor in random_weights(SPEC, seed).items()}
    weights = {slot: quantize(x, fmt) if x.ndim == 2 else Tensor.of(x) for slot, x in floats.items()}
    ids = random_ids(SPEC, 1, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ISA_VARIABLE, isa)
        fast = CpuBackend().load(SPEC, weights, replace(OPTIONS, threads=2, kv_dtype="f32"))
    exact = ReferenceBackend().load(SPEC, weights, OPTIONS)
    runs = SequenceRun(fast, range(1)), SequenceRun(exact, range(1))
    first, second = (float(np.abs(runs[0].feed(ids) - runs[1].feed(ids)).mean()) for _ in range(2))
    fast.close()
    assert first < 0.1 * second


@pytest.mark.parametrize(("quant", "kl"), [("f32", 1e-4), ("bf16", 1e-3), ("q8", 4e-3), ("q4", 0.1)])
def test_weights_are_quantised_at_load(quant: str, kl: float) -> None:
    """Each precision stays within its distance of the float32 model."""
    weights, ids = random_weights(SPEC), random_ids(SPEC, 40)
    want = SequenceRun(ReferenceBackend().load(SPEC, weights, OPTIONS), range(3)).feed(ids)
    runner = CpuBackend().load(SPEC, weights, replace(OPTIONS, quant=quant))  # type: ignore[arg-type]
    a, b = log_softmax(want), log_softmax(SequenceRun(runner, range(3)).feed(ids))
    assert float((np.exp(a) * (a - b)).sum()) < kl
    runner.close()


def test_greedy_without_logits_takes_the_arg_max() -> None:
    """The fast path that keeps no logits draws the token of the path that does."""
    runner = CpuBackend().load(SPEC, random_weights(SPEC), OPTIONS)
    for n in (1, 7, 16):
        batch = greedy_batch(n, SPEC, seed=n)
        kept, fast = runner.step(replace(batch, want_logits=True)), runner.step(batch)
        assert kept.logits is not None
        assert fast.logits is None
        np.testing.assert_array_equal(fast.token_ids, kept.logits.argmax(axis=1))
    runner.close()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(_native.supported_isas()),
    st.sampled_from([Format.Q4_0, Format.Q4_1, Format.Q8_0]),
    st.integers(0, 1000),
    st.integers(1, 16),
)
def test_the_most_likely_token_is_exact(isa: str, fmt: Format, seed: int, rows: int) -> None:
    """What a greedy row leaves out of the vocabulary's product never changes its token."""
    spec = msgspec.structs.replace(SPEC, n_layers=1, vocab_size=1500)
    weights = dict(random_weights(spec, seed))
    weights["head"] = quantize(dequantize(weights["head"]), fmt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ISA_VARIABLE, isa)
        runner = CpuBackend().load(spec, weights, replace(OPTIONS, threads=2))
    batch = greedy_batch(rows, spec, seed)
    kept, fast = runner.step(replace(batch, want_logits=True)), runner.step(batch)
    np.testing.assert_array_equal(fast.token_ids, kept.logits.argmax(axis=1))
    runner.close()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(_native.supported_isas()),
    st.integers(0, 1000),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([32, 64, 160]),
    st.booleans(),
    st.integers(1, 120),
)
def test_experts_of_any_number_and_size(
    isa: str, seed: int, count: int, top_k: int, width: int, normalize: bool, tokens: int
) -> None:
    """Experts are chosen, run and added up as in the reference."""
    experts = ExpertSpec(n_experts=count, top_k=min(top_k, count), d_ff=width, normalize=normalize)
    spec = msgspec.structs.replace(SPECS["mixtral"], experts=experts)
    weights, ids = random_weights(spec, seed), random_ids(spec, tokens, seed)
    options = replace(OPTIONS, threads=2, kv_dtype="f32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ISA_VARIABLE, isa)
        runner = CpuBackend().load(spec, weights, options)
    want = SequenceRun(ReferenceBackend().load(spec, weights, OPTIONS), range(8)).feed(ids)
    np.testing.assert_allclose(
        log_softmax(SequenceRun(runner, range(8)).feed(ids)), log_softmax(want), rtol=0, atol=2e-3
    )
    runner.close()


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    """A block that held a sequence gone wrong does no harm to the next one in it."""
    weights = dict(random_weights(SPEC))
    runner = CpuBackend().load(SPEC, weights, OPTIONS)
    ids = random_ids(SPEC, 20)
    want = SequenceRun(runner, [0, 1]).feed(ids)
    data = np.frombuffer(runner.kv.export_blocks([2, 3]), np.uint8).copy()
    finite = data.copy()
    finite.view(np.uint16)[:] = 0x7F7F  # the greatest bf16: what the cache holds instead of infinity
    runner.kv.import_blocks([2, 3], finite.tobytes())
    np.testing.assert_array_equal(SequenceRun(runner, [2, 3]).feed(ids), want)
    runner.close()


def test_a_closed_runner_refuses() -> None:
    """After close, a step and the cache raise RuntimeError, and sizes are still known."""
    runner = CpuBackend().load(SPEC, random_weights(SPEC), OPTIONS)
    size = runner.kv.block_bytes
    runner.close()
    runner.close()
    assert runner.kv.block_bytes == size
    with pytest.raises(RuntimeError, match="closed"):
        SequenceRun(runner, [0]).feed([1])
    with pytest.raises(RuntimeError, match="closed"):
        runner.kv.export_blocks([0])


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced instruction set that this machine lacks makes the backend unavailable, with the choices."""
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    reason = CpuBackend().available()
    assert reason is not None
    assert "portable" in reason


def test_kv_precisions_are_checked() -> None:
    """A cache precision that the backend lacks is refused by name."""
    with pytest.raises(UnsupportedError, match="fp7"):
        CpuBackend().kv_block_bytes(SPEC, "fp7")
