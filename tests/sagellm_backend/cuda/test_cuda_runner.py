"""The runner beyond the kit: graphs, steps that follow steps, precisions, fixed bits, whole engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
pytest.importorskip("triton", reason="triton is not installed: make test-cuda")

from sagellm_backend.adapter import AdapterRunner
from sagellm_backend.base import LoadOptions, RowSampling, Runner, StepBatch
from sagellm_backend.conformance import SequenceRun, run_batch
from sagellm_backend.conformance_specs import SPECS, random_adapter, random_ids, random_weights
from sagellm_backend.cuda import CudaBackend
from sagellm_backend.cuda.graphs import ladder
from sagellm_backend.cuda.runner import CudaRunner
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.weights import compute_dtype
from sagellm_backend.overlap import LaunchRunner
from sagellm_backend.quant import dequantize, quantize
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax
from sagellm_backend.tensors import Format
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.loader import open_model
from sagellm_core.overlap import OverlapEngine
from sagellm_core.testing import collect
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams

pytestmark = pytest.mark.cuda

OPTIONS = LoadOptions(n_blocks=64, max_rows=64, max_logit_rows=64)
EXACT = CudaSettings(device="cpu", dtype="f32")
FIXED = replace(EXACT, kernels="triton", invariant=True)


def load(name: str, settings: CudaSettings = EXACT, **changes: object) -> CudaRunner:
    spec = SPECS[name]
    return CudaBackend(settings).load(spec, random_weights(spec), replace(OPTIONS, **changes))  # type: ignore[arg-type]


def decode(runner: Runner, runs: list[SequenceRun], tokens: list[int]) -> np.ndarray:
    logits = run_batch([(run, [t]) for run, t in zip(runs, tokens, strict=True)], [GREEDY] * len(runs)).logits
    assert logits is not None
    return logits


GREEDY = RowSampling(params=SamplingParams(temperature=0.0))


def test_it_offers_what_the_engine_looks_for() -> None:
    """The runner takes adapters and can work ahead."""
    runner = load("llama")
    assert isinstance(runner, Runner)
    assert isinstance(runner, AdapterRunner)
    assert isinstance(runner, LaunchRunner)


@pytest.mark.parametrize("quant", ["q4", "q8", "bf16"])
def test_quantising_at_load_gives_the_reference_of_that_precision(quant: str) -> None:
    """Weights that are quantised at load give the logits of the reference with the same rounding."""
    spec = SPECS["llama"]
    weights = random_weights(spec)
    if quant == "q4":  # the reference rounds the vocabulary's matrices to 4 bits too, this backend keeps 8
        weights = {s: quantize(dequantize(t), Format.Q4_1) if s in ("embed", "head") else t for s, t in weights.items()}
    ids = random_ids(spec, 30)
    runners = [b.load(spec, weights, replace(OPTIONS, quant=quant)) for b in (CudaBackend(EXACT), ReferenceBackend())]
    got, want = (SequenceRun(runner, [0, 1]).feed(ids) for runner in runners)
    tolerance = 0.1 if quant == "q4" else 1e-3
    assert np.abs(log_softmax(got) - log_softmax(want)).max() < tolerance
    assert quant == "bf16" or runners[0].weight_bytes < runners[1].weight_bytes / 3


def test_eight_bit_floats_stay_near() -> None:
    """Matrices in e4m3 give logits near the exact ones; norms, embedding and head stay as they are."""
    runs = [SequenceRun(load("llama", s), [0, 1]) for s in (replace(EXACT, fp8=True), EXACT)]
    got, want = (log_softmax(run.feed(random_ids(SPECS["llama"], 20))) for run in runs)
    kl = float((np.exp(want) * (want - got)).sum())
    assert 1e-6 < kl < 0.05


@pytest.mark.parametrize(
    ("name", "fmt", "quant", "dtype"),
    [
        ("llama", Format.F32, "auto", "float32"),
        ("llama", Format.F16, "auto", "float16"),
        ("llama", Format.BF16, "auto", "bfloat16"),
        ("llama", Format.Q4_1, "auto", "bfloat16"),
        ("llama", Format.F32, "q4", "bfloat16"),
        ("llama", Format.BF16, "f32", "float32"),
        ("gemma2", Format.F16, "auto", "bfloat16"),  # its branches pass 65504
    ],
)
def test_activations_take_the_precision_of_the_weights(name: str, fmt: Format, quant: str, dtype: str) -> None:
    """The compute dtype follows the file and the option."""
    spec = SPECS[name]
    weights = {s: quantize(dequantize(t), fmt) if len(t.shape) > 1 else t for s, t in random_weights(spec).items()}
    assert compute_dtype(spec, weights, CudaSettings(device="cpu"), quant) == getattr(torch, dtype)


def replay_eagerly(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A capture that computes at each replay, from whatever the arrays hold then."""
    return run


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_captured_steps_give_the_plain_steps_logits(name: str) -> None:
    """Decode steps that run from a graph's arrays, padded to the next size, equal those that do not."""
    spec = SPECS[name]
    plain, graphed = load(name), load(name)
    graphed.make_graphs(replay_eagerly)
    sequences = [[SequenceRun(r, range(4 * i, 4 * i + 4)) for i in range(5)] for r in (plain, graphed)]
    for runs in sequences:
        for i, run in enumerate(runs):
            run.feed(random_ids(spec, 3 + 7 * i, seed=i))
    for step in range(4):
        for chosen in ([0, 1, 2, 3, 4], [4, 2], [1]):
            tokens = [5 + step + i for i in chosen]
            want, got = (
                decode(r, [runs[i] for i in chosen], tokens)
                for r, runs in zip((plain, graphed), sequences, strict=True)
            )
            np.testing.assert_allclose(got, want, atol=2e-5)
    assert graphed.graphs is not None
    assert graphed.graphs.captured == (1, 2, 8)
    assert graphed.graphs.replays == 9
    graphed.graphs.capture_all()
    assert graphed.graphs.captured == tuple(ladder(64))


def test_the_ladder_wastes_little() -> None:
    """Sizes begin at 1, grow, end at the most rows, and no batch above 8 is padded by more than half of it."""
    for most in (1, 5, 64, 256, 512):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[0] == 1
        assert sizes[-1] == most
    sizes = ladder(512)
    for rows in range(9, 500):
        size = next(s for s in sizes if s >= rows)
        assert size <= max(rows + 8, rows * 1.2)


def test_a_step_follows_one_that_is_not_known_yet() -> None:
    """Rows whose tokens are still to be drawn give what they give when the tokens are known."""
    spec = SPECS["llama"]
    plain, ahead = load("llama"), load("llama")
    prompts = [random_ids(spec, n, seed=n) for n in (9, 4)]
    rows = [RowSampling(SamplingParams(temperature=0.9), seed=i) for i in range(2)]

    def batch(tokens: list[int], starts: list[int], lengths: list[int], position: int) -> StepBatch:
        return StepBatch(
            token_ids=np.array(tokens, np.int32),
            starts=np.array(starts, np.int32),
            lengths=np.array(lengths, np.int32),
            block_tables=np.array([[0, 1], [2, 3]], np.int32),
            logit_rows=np.cumsum(lengths, dtype=np.int32) - 1,
            sampling=[replace(row, position=position) for row in rows],
        )

    first = batch(prompts[0] + prompts[1], [0, 0], [9, 4], 0)
    drawn = plain.step(first).token_ids
    want = plain.step(batch(drawn.tolist(), [9, 4], [1, 1], 1)).token_ids
    pending = ahead.launch(first)
    followed = ahead.launch(batch([-1, -2], [9, 4], [1, 1], 1), pending)
    assert pending.result().token_ids.tolist() == drawn.tolist()
    assert followed.result().token_ids.tolist() == want.tolist()
    with pytest.raises(ValueError, match="token id -3 follows logit row 2 of a step that draws 2"):
        ahead.launch(batch([-1, -3], [9, 4], [1, 1], 1), pending)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ahead.step(batch([-1, -2], [9, 4], [1, 1], 1))


def test_wrong_sampling_is_refused_before_anything_is_computed() -> None:
    """Ids outside the vocabulary and short masks raise ValueError and leave the cache as it was."""
    runner = load("llama")
    before = runner.kv.export_blocks([0])
    for row in (
        RowSampling(SamplingParams(logit_bias={320: 1.0})),
        RowSampling(SamplingParams(allowed_token_ids=(5, 320))),
        RowSampling(SamplingParams(), banned=(-1,)),
        RowSampling(SamplingParams(repetition_penalty=2.0), history=(400,)),
        RowSampling(SamplingParams(), mask=np.zeros(9, np.uint32)),
        RowSampling(SamplingParams(), target=320),
    ):
        with pytest.raises(ValueError, match="vocabulary"):
            run_batch([(SequenceRun(runner, [0]), [1, 2])], [row])
    assert runner.kv.export_blocks([0]) == before


def test_a_closed_runner_says_so() -> None:
    """Steps and blocks of a closed runner raise RuntimeError."""
    runner = load("llama")
    runner.close()
    for call in (lambda: SequenceRun(runner, [0]).feed([1]), lambda: runner.kv.export_blocks([0])):
        with pytest.raises(RuntimeError, match="closed"):
            call()


@pytest.fixture
def row_wise_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's product goes through a BLAS whose order of summation depends on the row's place; a GPU's does not."""
    from triton.runtime import interpreter

    def dot(self: object, a: object, b: object, acc: object, *_: object) -> object:
        product = np.einsum("ij,jk->ik", a.data, b.data)  # type: ignore[attr-defined]
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)  # type: ignore[attr-defined]

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3moe"])
@pytest.mark.usefixtures("row_wise_dot")
def test_fixed_tiles_give_fixed_bits(name: str) -> None:
    """In batch-invariant mode a sequence has the same bits alone, in chunks, and beside others."""
    runner, spec = load(name, FIXED), SPECS[name]
    ids, other = random_ids(spec, 21), random_ids(spec, 18, seed=5)
    want = SequenceRun(runner, [0, 1]).feed(ids)
    chunked = SequenceRun(runner, [2, 3])
    for part in (ids[:4], ids[4:20], ids[20:]):
        got = chunked.feed(part)
    assert np.array_equal(got, want)
    pair = [SequenceRun(runner, [4, 5]), SequenceRun(runner, [6, 7])]
    logits = run_batch([(pair[0], other), (pair[1], ids)], [GREEDY] * 2).logits
    assert logits is not None
    assert np.array_equal(logits[1], want)


def engine(runner: Runner, *, overlap: bool) -> Engine:
    settings = EngineSettings(
        engine_id="tiny", model="tiny", n_ctx=128, max_running=4, max_rows=48, max_logit_rows=64, backend="cuda"
    )
    return OverlapEngine(runner, settings) if overlap else Engine(runner, settings)


def requests(adapter: str | None = None) -> Iterator[EngineRequest]:
    rng = np.random.default_rng(5)
    shared = rng.integers(0, 320, 20).tolist()
    for index, length in enumerate((5, 40, 17, 33, 16)):
        params: dict[str, object] = {"temperature": 0.0} if index % 2 == 0 else {"temperature": 0.8, "top_p": 0.9}
        yield EngineRequest(
            request_id=str(index),
            prompt_token_ids=(*shared[: length // 2], *rng.integers(0, 320, length - length // 2).tolist()),
            sampling=SamplingParams(seed=index, max_tokens=16, logprobs=2, **params),  # type: ignore[arg-type]
            eos_token_ids=(3, 4),
            adapter=adapter if index in (1, 2) else None,
        )


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
def test_an_engine_says_what_the_references_engine_says(name: str, overlap: bool) -> None:
    """Continuous batching, prefix cache, sampling and endings give the reference's tokens, in either loop."""
    spec = SPECS[name]
    want = collect(engine(ReferenceBackend().load(spec, random_weights(spec), OPTIONS), overlap=False), requests())
    mine = engine(load(name), overlap=overlap)
    got = collect(mine, requests())
    for key, entry in want.items():
        assert got[key].token_ids == entry.token_ids, key
        assert got[key].finish_reason == entry.finish_reason
        np.testing.assert_allclose(got[key].logprobs, entry.logprobs, atol=1e-3)
    mine.check_integrity()


def test_an_engine_serves_adapters_in_one_batch() -> None:
    """Sequences with an adapter and without, side by side in the overlapped loop, say what they say on the reference."""
    spec = SPECS["llama"]
    engines = [
        engine(ReferenceBackend().load(spec, random_weights(spec), OPTIONS), overlap=False),
        engine(load("llama"), overlap=True),
    ]
    texts = []
    for each in engines:
        each.load_adapter(replace(random_adapter(spec, seed=2), name="second"))
        texts.append({name: got.token_ids for name, got in collect(each, requests("second")).items()})
    assert texts[0] == texts[1]
    assert texts[0] != {name: got.token_ids for name, got in collect(engines[0], requests()).items()}


def test_blocks_of_one_precision_travel_to_another_runner() -> None:
    """A bf16 cache exports its very bytes, and a sequence goes on from them elsewhere."""
    settings = CudaSettings(device="cpu", dtype="bf16")
    source, target = load("llama", settings), load("llama", settings)
    ids = random_ids(SPECS["llama"], 30)
    run = SequenceRun(source, [5, 9])
    run.feed(ids[:29])
    target.kv.import_blocks([1, 0], source.kv.export_blocks([5, 9]))
    moved = SequenceRun(target, [1, 0])
    moved.length = 29
    np.testing.assert_array_equal(moved.feed(ids[29:]), run.feed(ids[29:]))


@pytest.mark.model
@pytest.mark.parametrize("model", ["default_model_path", "gemma_model_path"])
def test_real_models_give_the_references_log_probabilities(model: str, request: pytest.FixtureRequest) -> None:
    """Packed weights of GGUF files, Q4_1 and the K formats, give the reference's likeliest tokens and nearly its numbers."""
    ids = [1, 504, 3575, 282, 4649, 314, 7042, 30, 657, 339, 1194, 253]
    with open_model(request.getfixturevalue(model)) as files:
        logits = []
        for backend in (CudaBackend(EXACT), ReferenceBackend()):
            runner = backend.load(files.spec, files.weights, LoadOptions(n_blocks=2, max_rows=16, max_logit_rows=16))
            batch = StepBatch(
                token_ids=np.array(ids, np.int32),
                starts=np.zeros(1, np.int32),
                lengths=np.array([len(ids)], np.int32),
                block_tables=np.array([[1]], np.int32),
                logit_rows=np.arange(len(ids), dtype=np.int32),
                sampling=[GREEDY] * len(ids),
                want_logits=True,
            )
            result = runner.step(batch).logits
            assert result is not None
            logits.append([log_softmax(row).astype(np.float64) for row in result])
            runner.close()
    kl = [float((np.exp(want) * (want - got)).sum()) for got, want in zip(*logits, strict=True)]
    agree = [got.argmax() == want.argmax() for got, want in zip(*logits, strict=True)]
    assert max(kl) < 1e-3, kl
    assert sum(agree) >= len(ids) - 1, kl
