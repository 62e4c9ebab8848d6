"""Whether the results are right on this GPU: the kit, each operation, real models, fixed bits."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench import Bench, Row
from shapes import REAL, random_weight_set

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, RowSampling, Runner, StepBatch
from sagellm_backend.conformance import CHECKS, Kit, SequenceRun
from sagellm_backend.cuda import CudaBackend
from sagellm_backend.cuda.device import on_device
from sagellm_backend.cuda.kernels import vector
from sagellm_backend.cuda.kernels.row_attention import RowAttention
from sagellm_backend.cuda.matrix import Matrix, to_fp8, to_q4, to_q8
from sagellm_backend.cuda.ops import AttentionShape, Rotation, TorchOps
from sagellm_backend.cuda.plan import DeviceStep, plan_step, upload
from sagellm_backend.cuda.runner import CudaRunner
from sagellm_backend.cuda.sampling import draw
from sagellm_backend.cuda.sampling_plan import plan_sampling
from sagellm_backend.cuda.triton_ops import TritonOps
from sagellm_backend.cuda.weights import Projection
from sagellm_backend.reference import ReferenceBackend
from sagellm_backend.sampling import log_softmax, sample_rows
from sagellm_protocol.sampling import SamplingParams

MOST_ERROR = 1e-2


KITS: dict[str, dict[str, object]] = {
    "f32": {"dtype": "f32"},
    "bf16": {"dtype": "bf16"},
    "fixed": {"dtype": "bf16", "invariant": True},
}
"""Precisions in which the kit runs, the last one bitwise."""


def kit(bench: Bench, name: str) -> Iterator[Row]:
    """Every check of the conformance kit in one of `KITS`."""
    limit = 2e-3 if name == "f32" else 0.2
    suite = Kit(CudaBackend(replace(bench.settings, **KITS[name])), tolerance=limit, format_tolerance=limit)  # type: ignore[arg-type]
    passed = 0
    for check in CHECKS:
        if text := _failure(check, suite):
            yield {"work": f"conformance kit, {name}", "value": text[:400], "ok": False}
        else:
            passed += 1
    yield {"work": f"conformance kit, {name}", "value": f"{passed} of {len(CHECKS)}", "ok": passed == len(CHECKS)}


def _failure(check: Callable[[Kit], None], kit: Kit) -> str:
    try:
        check(kit)
    except Exception as error:  # noqa: BLE001  one check's failure must not hide the others' results
        traceback.print_exc()
        return f"{check.__name__}: {type(error).__name__}: {error}"
    return ""


def _error(name: str, got: torch.Tensor, want: torch.Tensor, most: float = MOST_ERROR) -> Row:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return {"work": f"error of {name}", "value": f"{error:.2e}", "ok": error < most}


def _normal(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device).to(bench.dtype)


def _all_ops(bench: Bench) -> tuple[TorchOps, TritonOps, TritonOps]:
    """The yardstick, ours, and ours with fixed tiles."""
    return TorchOps(torch.float32), TritonOps(bench.dtype, 4), TritonOps(bench.dtype, 4, invariant=True)


def small_ops(bench: Bench) -> Iterator[Row]:
    exact, ours, _ = _all_ops(bench)
    d, device = bench.sizes.edge, bench.device
    tokens = torch.arange(7, device=device, dtype=torch.int32) - 3
    followed = ours.follow(tokens, tokens + 9).tolist() == exact.follow(tokens, tokens + 9).tolist()
    yield {"work": "tokens that only the device knows", "value": "equal" if followed else "differ", "ok": followed}
    positions, frequencies = (
        torch.tensor([0, 9, 131071], device=device, dtype=torch.int32),
        torch.rand(64, device=device).double(),
    )
    for got, want in zip(
        ours.angles(positions, frequencies, 1.2), exact.angles(positions, frequencies, 1.2), strict=True
    ):
        yield _error("angles", got, want, 1e-6)
    for rows in (1, 16, 200):
        x, branch, weight = torch.randn(rows, d, device=device), _normal(bench, rows, d), torch.rand(d, device=device)
        want = exact.residual_norm(x.clone(), branch.float(), weight, weight, 1e-5, 1.0)
        got = ours.residual_norm(x.clone(), branch, weight, weight, 1e-5, 1.0)
        yield _error(f"residual norm, {rows} rows", got[1], want[1])
        gate_up = _normal(bench, rows, 2 * d)
        for kind in ("silu", "gelu_tanh", "gelu"):
            yield _error(f"{kind}, {rows} rows", ours.activate(gate_up, kind), exact.activate(gate_up.float(), kind))


def products(bench: Bench) -> Iterator[Row]:
    exact, ours, fixed = _all_ops(bench)
    d, device = bench.sizes.edge, bench.device
    w = torch.randn(d + d // 2, d, device=device) / math.sqrt(d)
    kinds = {"dense": Matrix("dense", w.to(bench.dtype)), "q8": to_q8(w), "q4": to_q4(w)}
    if not bench.settings.on_gpu or torch.cuda.get_device_capability(device) >= (8, 9):
        kinds["fp8"] = to_fp8(w)
    for rows in (1, 16, 200):
        a = _normal(bench, rows, d)
        for kind, matrix in kinds.items():
            want = exact.matmul(a.float(), matrix, exact=True)
            projection = Projection((matrix,), (("0.o", matrix.outputs),))
            yield _error(f"product with {kind}, {rows} rows", ours.linear(a, projection), want)
            yield _error(f"product with {kind}, {rows} rows, fixed tiles", fixed.linear(a, projection), want)
            yield _error(f"exact product with {kind}, {rows} rows", ours.matmul(a, matrix, exact=True), want)
        stack = Matrix("dense", torch.stack([w[: d // 8].to(bench.dtype) * (i + 1) for i in range(8)]))
        chosen = torch.randint(0, 8, (rows * 2,), device=device)
        source = torch.arange(rows * 2, device=device) // 2
        want = exact.grouped(a.float(), stack, exact.routes(source, chosen, 8))
        yield _error(f"grouped product, {rows} rows", ours.grouped(a, stack, ours.routes(source, chosen, 8)), want)


def attention(bench: Bench) -> Iterator[Row]:
    exact, ours, fixed = _all_ops(bench)
    gathered = TritonOps(bench.dtype, 4, gather_prompts=True)
    device = bench.device
    for lengths, places in (([1] * 4, [5, 300, 1023, 2000]), ([200, 1, 77], [0, 900, 513]), ([300, 300], [0, 700])):
        starts = [start * bench.sizes.context // REAL.context for start in places]
        for window, cap in ((0, 0.0), (256, 30.0)):
            shape = AttentionShape(16, 4, 128, 1 / math.sqrt(128), window, cap)
            cache = torch.randn(512, 2, 4, BLOCK_SIZE, 128, device=device).to(bench.dtype)
            qkv, angles = _normal(bench, sum(lengths), 24 * 128), torch.randn(sum(lengths), 64, device=device)
            weights = (torch.rand(128, device=device), torch.rand(128, device=device))
            rotation, base = Rotation(angles.cos(), angles.sin(), interleaved=False), cache.float()
            plain = _step(lengths, starts, exact, device)
            q = exact.rotate_and_store(qkv.float(), plain, rotation, base, shape, weights, 1e-5)
            want = exact.attend(q, plain, base, shape)
            ways = [("", ours)]
            ways += (
                [(", fixed spans", fixed)] if bench.settings.on_gpu or max(lengths) < 300 else []
            )  # minutes, interpreted
            ways += [] if window else [(", gathered", gathered)]
            for label, these in ways:
                mine, step = cache.clone(), _step(lengths, starts, these, device)
                got_q = these.rotate_and_store(qkv, step, rotation, mine, shape, weights, 1e-5)
                name = f"{lengths} rows at {starts}, window {window}, cap {cap:g}{label}"
                yield _error(f"rotation and store, {name}", mine, base)
                yield _error(f"attention, {name}", these.attend(got_q, step, mine, shape), want)


def single_rows(bench: Bench) -> Iterator[Row]:
    """The short way of one sequence: products with their norm, attention from raw projections, with and without early launch."""
    exact, (d, device) = TorchOps(torch.float32), (bench.sizes.edge, bench.device)
    x, gain = torch.randn(2, d, device=device), torch.rand(d, device=device) + 0.1
    gate_up = (torch.randn(2 * d, d, device=device) / math.sqrt(d)).to(bench.dtype)
    normed = exact.norm(x, gain, 1e-5) @ gate_up.float().T
    for early in (False, True) if bench.settings.on_gpu else (False,):
        label = ", early launch" if early else ""
        got = vector.product(x, gate_up, torch.float32, gain=gain, eps=1e-5, early=early)
        yield _error(f"product with its norm{label}", got, normed)
        got = vector.gated_product(x, gate_up, gain, "silu", bench.dtype, eps=1e-5, early=early)
        yield _error(f"gated product{label}", got, exact.activate(normed, "silu"))
        added = x.clone()
        vector.add_product(
            added, torch.ones(2, d, device=device, dtype=bench.dtype), gate_up[:d].contiguous(), 0.5, early=early
        )
        yield _error(f"product added{label}", added, x + 0.5 * gate_up[:d].float().sum(dim=1))
        for starts in ([3, 40], [bench.sizes.context, 5 * bench.sizes.context]):
            shape = AttentionShape(16, 4, 128, 1 / math.sqrt(128), 0, 0.0)
            cache = torch.randn(700, 2, 4, BLOCK_SIZE, 128, device=device).to(bench.dtype)
            qkv, angles = _normal(bench, 2, 24 * 128), torch.randn(2, 64, device=device)
            rotation, base = Rotation(angles.cos(), angles.sin(), interleaved=False), cache.float()
            step = _step([1, 1], starts, exact, device)
            q = exact.rotate_and_store(qkv.float(), step, rotation, base, shape, None, 1e-5)
            want = exact.attend(q, step, base, shape)
            one_row = RowAttention(2, 16, 4, 128, cache.device, early=early)
            for turn in ("", ", again"):
                got = one_row.attend(qkv, step, rotation, cache, None, 1e-5, scale=shape.scale, window=0, cap=0.0)
                yield _error(f"attention of one row at {starts}{label}{turn}", got, want)
            yield _error(f"its store{label}", cache, base)


def draws(bench: Bench) -> Iterator[Row]:
    """Plain draws have the definition's bits, over a vocabulary of a real model's size."""
    ours, vocab = TritonOps(bench.dtype, 4), bench.sizes.small.vocab_size
    logits = torch.randn(64, vocab, device=bench.device) * 3
    rows = [RowSampling(SamplingParams(temperature=0.3 + i / 40), seed=i, position=3 * i) for i in range(64)]
    plan = plan_sampling(rows, vocab)
    want = sample_rows(logits.cpu().numpy(), rows)[0].tolist()
    same = draw(ours, logits, plan, rows).tolist() == want
    yield {"work": "64 plain draws", "value": "the reference's" if same else "differ", "ok": same}
    filtered = [replace(row, params=SamplingParams(temperature=0.8, top_p=0.9, top_k=50)) for row in rows[:16]]
    want = sample_rows(logits[:16].cpu().numpy(), filtered)[0].tolist()
    same = draw(ours, logits[:16], plan_sampling(filtered, vocab), filtered).tolist() == want
    yield {"work": "16 filtered draws", "value": "the reference's" if same else "differ", "ok": same}


def chained(bench: Bench) -> Iterator[Row]:
    """A whole model, step after step and then from graphs: early launch changes no bit, and the short way nothing of weight."""
    spec, tokens = bench.sizes.small, range(1, 9)
    options = LoadOptions(n_blocks=2, max_rows=32, max_logit_rows=4)
    weights = random_weight_set(spec, bench.device)
    found: dict[str, np.ndarray] = {}
    for way, early in (("usual", False), ("short", False), ("early", bench.settings.on_gpu)):
        with on_device(bench.settings):
            runner = CudaRunner(spec, weights, options, replace(bench.settings, early=early), "bf16")
        if way == "usual":
            runner._single = runner.single_graphs = None
        run = SequenceRun(runner, [1, 0])
        found[way] = np.stack([run.feed([token]) for token in tokens])
        runner.kv.close()
        if way == "short":
            short, usual = (torch.from_numpy(found[each]) for each in ("short", "usual"))
            yield _error("8 steps of a whole model, the short way", short, usual, 3e-2)
    same = np.array_equal(found["short"], found["early"])
    yield {"work": "8 steps of a whole model, early launch", "value": "the same bits" if same else "differ", "ok": same}


OPS = {
    "small": small_ops, "products": products, "attention": attention, "single": single_rows, "draws": draws, "chained": chained,
}  # fmt: skip
"""‖out − ref‖ / ‖ref‖ of each operation against the same in float32 torch."""


def _step(lengths: list[int], starts: list[int], ops: TorchOps, device: str) -> DeviceStep:
    width = max(-(-(a + b) // BLOCK_SIZE) for a, b in zip(lengths, starts, strict=True))
    batch = StepBatch(
        token_ids=np.zeros(sum(lengths), np.int32),
        starts=np.array(starts, np.int32),
        lengths=np.array(lengths, np.int32),
        block_tables=np.arange(len(lengths) * width, dtype=np.int32).reshape(-1, width),
        logit_rows=np.zeros(0, np.int32),
        sampling=[],
    )
    return upload(plan_step(batch, ops.short_rows, ops.long_rows, ops.prompt_rows), device)


def quality(bench: Bench) -> Iterator[Row]:
    """Top-1 agreement and KL against the float32 reference on the same weights, over a text's worth of positions."""
    from sagellm_core.loader import open_model
    from sagellm_core.text.load import load_tokenizer

    text = Path(__file__).with_name("text.txt").read_text(encoding="utf-8")
    if not bench.models:
        yield {"work": "quality", "value": "no model file was given (--model PATH)"}
    for path in bench.models:
        ids = load_tokenizer(str(path)).encode(text)[: 192 if bench.settings.on_gpu else 12]
        with open_model(path) as files:
            options = LoadOptions(n_blocks=16, max_rows=256, max_logit_rows=256)
            runners = [
                b.load(files.spec, files.weights, options) for b in (ReferenceBackend(), CudaBackend(bench.settings))
            ]
        want = _log_probabilities(runners[0], ids)
        decoded = SequenceRun(runners[1], range(16))
        ways = {"prompt": _log_probabilities(runners[1], ids), "decode": [log_softmax(decoded.feed([i])) for i in ids]}
        runners[1].close()
        for way, got in ways.items():
            agree = sum(int(w.argmax() == g.argmax()) for w, g in zip(want, got, strict=True))
            kl = [
                float((np.exp(w.astype(np.float64)) * (w.astype(np.float64) - g)).sum())
                for w, g in zip(want, got, strict=True)
            ]
            share, mean = agree / len(ids), sum(kl) / len(ids)
            yield {
                "work": f"{path.name}, {way}: top-1 agreement, mean KL over {len(ids)} positions",
                "value": f"{share:.1%}, {mean:.2e}",
                "ok": share > 0.95 and mean < 0.02,
            }


def _log_probabilities(runner: Runner, ids: list[int]) -> list[np.ndarray]:
    """Of every position of a text, in one step."""
    batch = StepBatch(
        token_ids=np.array(ids, np.int32),
        starts=np.zeros(1, np.int32),
        lengths=np.array([len(ids)], np.int32),
        block_tables=np.arange(16, dtype=np.int32)[None],
        logit_rows=np.arange(len(ids), dtype=np.int32),
        sampling=[RowSampling(SamplingParams(temperature=0.0))] * len(ids),
        want_logits=True,
    )
    logits = runner.step(batch).logits
    assert logits is not None
    return [log_softmax(row) for row in logits]
