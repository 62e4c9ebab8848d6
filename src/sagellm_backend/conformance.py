"""The kit that every backend must pass, also a third party's.

With pytest, in the backend's own tests::

    KIT = Kit(MyBackend())

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(KIT)

A check raises AssertionError with what differed and by how much. The yardstick is `ReferenceBackend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sagellm_backend.adapter import Adapter, AdapterRunner
from sagellm_backend.base import BLOCK_SIZE, Backend, LoadOptions, RowSampling, Runner, StepBatch, StepResult
from sagellm_backend.conformance_encoder import encoders_match_reference
from sagellm_backend.conformance_specs import SPECS, random_adapter, random_ids, random_weights, sampling_rows
from sagellm_backend.quant import dequantize, quantize
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax, sample_rows
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Format, Tensor, Weights
from sagellm_protocol.sampling import SamplingParams

__all__ = ["CHECKS", "Kit", "SequenceRun", "run_batch"]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

GREEDY = RowSampling(params=SamplingParams(temperature=0.0))


@dataclass(frozen=True)
class Kit:
    """A backend under test.

    Attributes:
        backend: it.
        tolerance: most that a log-probability may differ from the reference on float32 weights. A KV cache in bf16 needs
            about 0.05.
        format_tolerance: the same on weights in the quantised formats, where the reference computes with the exact
            dequantised values. A backend that quantises activations to int8 needs about 0.3.
        options: of every load.
        specs: name -> spec to run; a backend that lacks an operation leaves its specs out and says so in its docs.
        formats: file formats to load.
    """

    backend: Backend
    tolerance: float = 1e-3
    format_tolerance: float = 1e-3
    options: LoadOptions = field(default_factory=lambda: LoadOptions(n_blocks=64, max_rows=256, max_logit_rows=64))
    specs: Mapping[str, DecoderSpec] = field(default_factory=lambda: SPECS)
    formats: Sequence[Format] = (Format.F32, Format.F16, Format.BF16, Format.Q4_0, Format.Q4_1, Format.Q8_0)

    @property
    def plain(self) -> DecoderSpec:
        """The spec for checks that need only one."""
        return self.specs["llama"]

    def load(self, spec: DecoderSpec, weights: Weights | None = None, **changes: object) -> Runner:
        """Load on the backend under test."""
        options = replace(self.options, **changes)  # type: ignore[arg-type]
        return self.backend.load(spec, random_weights(spec) if weights is None else weights, options)

    def reference(self, spec: DecoderSpec, weights: Weights) -> Runner:
        """Load on the reference."""
        return ReferenceBackend().load(spec, weights, replace(self.options, threads=0, quant="auto", kv_dtype="auto"))


class SequenceRun:
    """One sequence on a runner, fed piece by piece."""

    def __init__(self, runner: Runner, blocks: Sequence[int]) -> None:
        self.runner = runner
        self.blocks = np.asarray(blocks, np.int32)
        self.length = 0

    def feed(self, ids: Sequence[int], row: RowSampling = GREEDY) -> Float32:
        """Run the next tokens; return the raw logits after the last of them, (vocab,)."""
        logits: Float32 | None = run_batch([(self, ids)], [row]).logits
        assert logits is not None, "want_logits gave no logits"
        out: Float32 = logits[0]
        return out


def run_batch(
    parts: Sequence[tuple[SequenceRun, Sequence[int]]],
    rows: Sequence[RowSampling],
    *,
    want_hidden: bool = False,
    adapters: Int32 | None = None,
    masks_ready: Callable[[], None] | None = None,
) -> StepResult:
    """Run one step with a chunk of each sequence; logits of each chunk's last row."""
    lengths = np.array([len(ids) for _, ids in parts], np.int32)
    width = max(run.blocks.size for run, _ in parts)
    tables = np.full((len(parts), width), -1, np.int32)
    for table, (run, _) in zip(tables, parts, strict=True):
        table[: run.blocks.size] = run.blocks
    batch = StepBatch(
        token_ids=np.concatenate([np.asarray(ids, np.int32) for _, ids in parts]),
        starts=np.array([run.length for run, _ in parts], np.int32),
        lengths=lengths,
        block_tables=tables,
        logit_rows=np.cumsum(lengths, dtype=np.int32) - 1,
        sampling=rows,
        want_logits=bool(rows),
        want_hidden=want_hidden,
        adapters=adapters,
        masks_ready=masks_ready,
    )
    result = parts[0][0].runner.step(batch)
    for run, ids in parts:
        run.length += len(ids)
    return result


def _gap(got: Float32, want: Float32) -> float:
    """Largest difference of log-probabilities, over tokens that are not hopeless."""
    a, b = log_softmax(got), log_softmax(want)
    return float(np.abs(a - b)[b > -12].max())


def _close(kit: Kit, got: Float32, want: Float32, what: str, tolerance: float | None = None) -> None:
    limit = kit.tolerance if tolerance is None else tolerance
    assert np.isfinite(got).all(), f"{what}: logits are not finite"
    gap = _gap(got, want)
    assert gap <= limit, f"{what}: log-probabilities differ by {gap:.2e}, the tolerance is {limit:.0e}"


def _same(kit: Kit, got: Float32, want: Float32, what: str) -> None:
    """Bit-equal where the backend promises batch invariance, else within tolerance."""
    if kit.backend.capability().batch_invariant:
        gap = _gap(got, want)
        assert np.array_equal(got, want), f"{what}: promised bit-equal, but log-probabilities differ by up to {gap:.2e}"
    else:
        _close(kit, got, want, what)


def forward_matches_reference(kit: Kit) -> None:
    """Prefill and decode of every kind of spec give the reference's logits."""
    for name, spec in kit.specs.items():
        weights = random_weights(spec)
        ids = random_ids(spec, 53)
        runs = [SequenceRun(r, [3, 1, 5, 0]) for r in (kit.load(spec, weights), kit.reference(spec, weights))]
        for part in (ids[:37], ids[37:38], ids[38:39], ids[39:]):
            got, want = (run.feed(part) for run in runs)
            _close(kit, got, want, f"{name} after {runs[0].length} tokens")
        runs[0].runner.close()


def long_context_matches_reference(kit: Kit) -> None:
    """A context of several hundred tokens, beyond any window and tile, gives the reference's logits."""
    for name in ("llama", "gemma2"):
        if (spec := kit.specs.get(name)) is None:
            continue
        weights, ids = random_weights(spec), random_ids(spec, 700)
        runs = [SequenceRun(r, range(48)) for r in (kit.load(spec, weights), kit.reference(spec, weights))]
        for part in (ids[:250], ids[250:500], ids[500:699], ids[699:]):
            got, want = (run.feed(part) for run in runs)
            _close(kit, got, want, f"{name} after {runs[0].length} tokens")
        runs[0].runner.close()


def formats_match_reference(kit: Kit) -> None:
    """Weights in every file format load and give the reference's logits on the dequantised values."""
    spec = kit.plain
    plain = random_weights(spec)
    for fmt in kit.formats:
        weights = {slot: t if len(t.shape) == 1 else quantize(dequantize(t), fmt) for slot, t in plain.items()}
        ids = random_ids(spec, 30)
        runs = [SequenceRun(r, [1, 2]) for r in (kit.load(spec, weights), kit.reference(spec, weights))]
        tolerance = kit.tolerance if fmt in (Format.F32, Format.F16, Format.BF16) else kit.format_tolerance
        got, want = (run.feed(ids) for run in runs)
        _close(kit, got, want, f"weights in {fmt.name}", tolerance)
        runs[0].runner.close()


def chunking_does_not_matter(kit: Kit) -> None:
    """A prompt gives the same logits in one piece, in odd chunks and token by token."""
    for name, spec in kit.specs.items():
        runner = kit.load(spec)
        ids = random_ids(spec, 45)
        want = SequenceRun(runner, range(3)).feed(ids)
        for borders in ([0, 1, 8, 23, 45], [0, 16, 32, 45], list(range(46))):
            run = SequenceRun(runner, range(3, 6))
            for a, b in pairwise(borders):
                got = run.feed(ids[a:b])
            _same(kit, got, want, f"{name} cut at {borders}")
        runner.close()


def batch_does_not_matter(kit: Kit) -> None:
    """A sequence gives the same logits alone and beside others, in prefill and in decode, in any place."""
    for name, spec in kit.specs.items():
        runner = kit.load(spec)
        prompts = [random_ids(spec, n, seed=n) for n in (20, 1, 33, 7, 16)]
        alone = []
        for prompt in prompts:
            run = SequenceRun(runner, range(60, 64))
            alone.append([run.feed(prompt), run.feed([5]), run.feed([9])])
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
            runs = {i: SequenceRun(runner, range(4 * i, 4 * i + 4)) for i in order}
            for step, tokens in enumerate((None, [5], [9])):
                result = run_batch([(runs[i], tokens or prompts[i]) for i in order], [GREEDY] * len(order))
                assert result.logits is not None
                for place, i in enumerate(order):
                    _same(kit, result.logits[place], alone[i][step], f"{name}: sequence {i} at place {place} of 5")
        runner.close()


def blocks_may_lie_anywhere(kit: Kit) -> None:
    """Which blocks hold a sequence, and what they held before, does not change its logits."""
    runner = kit.load(kit.plain)
    ids = random_ids(kit.plain, 40)
    want = SequenceRun(runner, [0, 1, 2]).feed(ids)
    SequenceRun(runner, [9, 30, 4, 17]).feed(random_ids(kit.plain, 64, seed=3))
    run = SequenceRun(runner, [30, 4, 9])
    run.feed(ids[:17])
    _same(kit, run.feed(ids[17:]), want, "scattered, used blocks")
    runner.close()


def blocks_copy_and_travel(kit: Kit) -> None:
    """Copied blocks, and blocks exported to another runner, continue their sequence exactly."""
    source, other = kit.load(kit.plain), kit.load(kit.plain)
    ids = random_ids(kit.plain, 40)
    run = SequenceRun(source, [0, 1, 2])
    run.feed(ids[:39])
    source.kv.copy_blocks([(0, 10), (1, 11), (2, 12)])
    data = source.kv.export_blocks([0, 1, 2])
    assert len(data) == 3 * source.kv.block_bytes, f"3 blocks exported as {len(data)} bytes"
    other.kv.import_blocks([7, 5, 6], data)
    assert other.kv.export_blocks([7, 5, 6]) == data, "an import and export of blocks changed their content"
    want = run.feed(ids[39:])
    for runner, blocks in ((source, [10, 11, 12]), (other, [7, 5, 6])):
        copy = SequenceRun(runner, blocks)
        copy.length = 39
        _same(kit, copy.feed(ids[39:]), want, "continuation on copied blocks")
    for runner in (source, other):
        runner.close()


def blocks_refuse_bad_content(kit: Kit) -> None:
    """Content of the wrong length and block numbers outside the cache raise ValueError."""
    runner = kit.load(kit.plain)
    kv = runner.kv
    _refused(lambda: kv.import_blocks([0], bytes(kv.block_bytes - 1)), "an import one byte short")
    _refused(lambda: kv.copy_blocks([(0, kv.n_blocks)]), "a copy to a block outside the cache")
    _refused(lambda: kv.export_blocks([-1]), "an export of block -1")
    runner.close()


def draws_match_reference(kit: Kit) -> None:
    """Every sampler draws, from the backend's own logits, the very token that the reference draws."""
    spec = kit.plain
    runner = kit.load(spec)
    rows = sampling_rows(spec.vocab_size)
    for seed in range(8):
        runs = [SequenceRun(runner, [i]) for i in range(len(rows))]
        parts = [(run, random_ids(spec, 1 + i % 9, seed=seed)) for i, run in enumerate(runs)]
        drawn = [replace(row, seed=seed * 7919 - 3, position=seed) for row in rows]
        result = run_batch(parts, drawn)
        assert result.logits is not None
        tokens, logprobs, top_ids, top_logprobs = sample_rows(result.logits, drawn)
        wrong = np.flatnonzero(result.token_ids != tokens)
        assert wrong.size == 0, (
            f"row {wrong[0]} ({drawn[wrong[0]].params}) drew {result.token_ids[wrong[0]]}, the reference {tokens[wrong[0]]}"
        )
        np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4, err_msg="logprobs")
        np.testing.assert_array_equal(result.top_ids, top_ids, err_msg="top_ids")
        np.testing.assert_allclose(result.top_logprobs, top_logprobs, atol=1e-4, err_msg="top_logprobs")
    runner.close()


def masks_may_come_late(kit: Kit) -> None:
    """Masks that are written only when `masks_ready` is called give the draws of masks that were there before.

    It is called once a step; what it raises, the step raises, and the runner works on.
    """
    spec = kit.plain
    runner = kit.load(spec)
    rows = [row for row in sampling_rows(spec.vocab_size) if row.target < 0]
    rng = np.random.default_rng(3)
    masks = rng.integers(0, 2**32, (len(rows), (spec.vocab_size + 31) // 32), dtype=np.uint32)
    calls = 0

    def draw(masks: npt.NDArray[np.uint32], masks_ready: Callable[[], None] | None) -> StepResult:
        runs = [SequenceRun(runner, [i]) for i in range(len(rows))]
        parts = [(run, random_ids(spec, 1 + i % 5, seed=i)) for i, run in enumerate(runs)]
        masked = [replace(row, mask=mask) for row, mask in zip(rows, masks, strict=True)]
        return run_batch(parts, masked, masks_ready=masks_ready)

    late = np.zeros_like(masks)

    def write() -> None:
        nonlocal calls
        calls += 1
        late[:] = masks

    def fail() -> None:
        raise ArithmeticError("no masks")

    want, got = draw(masks, None), draw(late, write)
    assert calls == 1, f"masks_ready was called {calls} times in a step"
    np.testing.assert_array_equal(got.token_ids, want.token_ids, err_msg="draws under masks that came late")
    assert (want.token_ids >= 0).any(), "nothing was drawn"
    failed = False
    try:
        draw(late, fail)
    except ArithmeticError:
        failed = True
    assert failed, "what masks_ready raised was lost"
    np.testing.assert_array_equal(draw(masks, None).token_ids, want.token_ids, err_msg="after masks_ready raised")
    runner.close()


def hidden_states_match_reference(kit: Kit) -> None:
    """Hidden states of chosen rows equal the reference's, with logits and without any."""
    spec = kit.plain
    weights, ids = random_weights(spec), random_ids(spec, 21)
    want = run_batch([(SequenceRun(kit.reference(spec, weights), [0, 1]), ids)], [], want_hidden=True).hidden
    runner = kit.load(spec, weights)
    for rows in ([], [GREEDY]):
        result = run_batch([(SequenceRun(runner, [0, 1]), ids)], rows, want_hidden=True)
        assert result.hidden is not None, "want_hidden gave no hidden states"
        assert want is not None
        scale = float(np.abs(want).max())
        gap = float(np.abs(result.hidden - want).max()) / scale
        assert gap <= kit.tolerance, f"hidden states differ by {gap:.2e} of their largest value"
        assert result.token_ids.size == len(rows), "tokens were drawn for rows without sampling"
    runner.close()


def adapters_act_as_merged_weights(kit: Kit) -> None:
    """Sequences with two adapters and with none, in one batch, give what models with the merged weights give.

    A backend without `AdapterRunner` must refuse a batch that names an adapter.
    """
    spec = kit.plain
    weights = random_weights(spec)
    runner = kit.load(spec, weights)
    ids = [random_ids(spec, n, seed=n) for n in (20, 33, 7, 1)]
    numbers = np.array([4, -1, 2, 4], np.int32)
    if not isinstance(runner, AdapterRunner):
        run = SequenceRun(runner, [0, 1])
        _refused(lambda: run_batch([(run, ids[0])], [GREEDY], adapters=numbers[:1]), "a batch with an adapter")
        return
    adapters = {number: random_adapter(spec, seed=number) for number in (2, 4)}
    for number, adapter in adapters.items():
        runner.load_adapter(number, adapter)
    runs = [SequenceRun(runner, range(3 * i, 3 * i + 3)) for i in range(4)]
    for step in range(2):
        parts = [(run, part if step == 0 else [7]) for run, part in zip(runs, ids, strict=True)]
        logits = run_batch(parts, [GREEDY] * 4, adapters=numbers).logits
        assert logits is not None
        for i, number in enumerate(numbers.tolist()):
            merged = weights if number < 0 else _merged(weights, adapters[number])
            want = SequenceRun(kit.reference(spec, merged), range(3)).feed(ids[i] + [7] * step)
            _close(kit, logits[i], want, f"sequence {i} with adapter {number}, step {step}")
    for i, number in enumerate(numbers.tolist()):
        alone = SequenceRun(runner, range(20, 23))
        own = np.array([number], np.int32)
        run_batch([(alone, ids[i])], [GREEDY], adapters=own)
        got = run_batch([(alone, [7])], [GREEDY], adapters=own).logits
        assert got is not None
        assert logits is not None
        _same(kit, logits[i], got[0], f"sequence {i} with adapter {number}, beside others and alone")
    runner.unload_adapter(2)
    _refused(lambda: run_batch([(runs[2], [1])], [GREEDY], adapters=np.array([2], np.int32)), "an unloaded adapter")
    broken = Adapter("broken", {"0.q": (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32))})
    _refused(lambda: runner.load_adapter(2, broken), "an adapter of another shape", "0.q")
    runner.close()


def _merged(weights: Weights, adapter: Adapter) -> Weights:
    changed = {slot: Tensor.of(dequantize(weights[slot]) + b @ a) for slot, (a, b) in adapter.factors.items()}
    return {**weights, **changed}


def weights_are_checked(kit: Kit) -> None:
    """A missing slot and a slot of another shape raise ValueError that names the slot."""
    spec = kit.plain
    weights = dict(random_weights(spec))
    broken = dict(weights)
    del broken["1.up"]
    _refused(lambda: kit.load(spec, broken), "a missing weight", "1.up")
    wrong = weights | {"0.q": Tensor.of(np.zeros((3, spec.d_model), np.float32))}
    _refused(lambda: kit.load(spec, wrong), "a weight of another shape", "0.q")


def batches_are_checked(kit: Kit) -> None:
    """A batch that does not add up raises ValueError, and the runner works on."""
    spec = kit.plain
    runner = kit.load(spec)
    want = SequenceRun(runner, [0]).feed([1, 2, 3])
    good = StepBatch(
        token_ids=np.array([1, 2, 3], np.int32),
        starts=np.array([0], np.int32),
        lengths=np.array([3], np.int32),
        block_tables=np.array([[0]], np.int32),
        logit_rows=np.array([2], np.int32),
        sampling=[GREEDY],
        want_logits=True,
    )
    bad: dict[str, dict[str, object]] = {
        "a token outside the vocabulary": {"token_ids": np.array([1, spec.vocab_size, 3], np.int32)},
        "a negative token": {"token_ids": np.array([1, -1, 3], np.int32)},
        "lengths that do not sum to the rows": {"lengths": np.array([2], np.int32)},
        "a block outside the cache": {"block_tables": np.array([[runner.kv.n_blocks]], np.int32)},
        "no block": {"block_tables": np.array([[-1]], np.int32)},
        "too narrow a table": {"starts": np.array([BLOCK_SIZE], np.int32)},
        "a negative start": {"starts": np.array([-1], np.int32)},
        "a logit row outside the batch": {"logit_rows": np.array([3], np.int32)},
        "sampling for another number of rows": {"sampling": [GREEDY, GREEDY]},
    }
    for what, change in bad.items():
        batch = replace(good, **change)  # type: ignore[arg-type]
        _refused(lambda batch=batch: runner.step(batch), what)  # type: ignore[misc]
    logits = runner.step(good).logits
    assert logits is not None
    _same(kit, logits[0], want, "after refused batches")
    runner.close()


def accounting_is_exact(kit: Kit) -> None:
    """Block sizes are known before loading, and closing twice is harmless."""
    backend = kit.backend
    assert backend.available() is None, f"{backend.name} is not available: {backend.available()}"
    runner = kit.load(kit.plain)
    planned = backend.kv_block_bytes(kit.plain, kit.options.kv_dtype)
    assert runner.kv.block_bytes == planned, f"a block has {runner.kv.block_bytes} bytes, {planned} were announced"
    assert runner.kv.n_blocks == kit.options.n_blocks, f"{runner.kv.n_blocks} blocks instead of {kit.options.n_blocks}"
    assert runner.weight_bytes > 0, "weight_bytes is 0"
    assert runner.spec == kit.plain, "the runner reports another spec"
    memory = backend.memory()
    assert 0 < memory.free <= memory.total, f"memory {memory} is not plausible"
    runner.close()
    runner.close()


def _refused(call: Callable[[], object], what: str, mention: str = "") -> None:
    message = None
    try:
        call()
    except ValueError as error:
        message = str(error)
    assert message is not None, f"{what} was accepted"
    assert mention in message, f"{what}: the error does not name {mention!r}: {message}"


CHECKS: tuple[Callable[[Kit], None], ...] = (
    forward_matches_reference,
    long_context_matches_reference,
    formats_match_reference,
    chunking_does_not_matter,
    batch_does_not_matter,
    blocks_may_lie_anywhere,
    blocks_copy_and_travel,
    blocks_refuse_bad_content,
    draws_match_reference,
    masks_may_come_late,
    hidden_states_match_reference,
    adapters_act_as_merged_weights,
    encoders_match_reference,
    weights_are_checked,
    batches_are_checked,
    accounting_is_exact,
)
"""Every check, in an order in which the first failure is the most telling."""
