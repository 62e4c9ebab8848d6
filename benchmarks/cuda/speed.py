"""Times on the GPU: decode, prefill, the overlapped loop, and a mix of requests. Each section yields its rows as it has them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from bench import Bench, Row, each
from shapes import prefill_flops, random_runner, read_bytes

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, RowSampling, StepBatch
from sagellm_backend.cuda.device import on_device
from sagellm_backend.cuda.ops import AttentionShape
from sagellm_backend.cuda.plan import plan_step, upload
from sagellm_backend.cuda.runner import CudaRunner
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.triton_ops import TritonOps
from sagellm_backend.spec import DecoderSpec
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.overlap import OverlapEngine
from sagellm_core.testing import collect
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams

GREEDY = RowSampling(params=SamplingParams(temperature=0.0))


def limits(bench: Bench) -> Iterator[Row]:
    """The machine's limits."""
    found = bench.measured()
    copy, gemm = found["copy_bytes_per_s"], found["gemm_flops_per_s"]
    yield {"work": "copy bandwidth (read and written)", "value": f"{copy / 1e12:.2f} TB/s", "limits": found}
    yield {"work": f"bf16 GEMM {bench.sizes.gemm}³", "value": f"{gemm / 1e12:.0f} TFLOP/s"}


# ------------------------------------------------------------------ decode


def decode_batch(contexts: list[int], width: int, tokens: list[int]) -> StepBatch:
    """One row for each of sequences that lie one after another in the cache."""
    n = len(contexts)
    return StepBatch(
        token_ids=np.array(tokens, np.int32),
        starts=np.array(contexts, np.int32),
        lengths=np.ones(n, np.int32),
        block_tables=np.arange(n * width, dtype=np.int32).reshape(n, width),
        logit_rows=np.arange(n, dtype=np.int32),
        sampling=[GREEDY] * n,
    )


def decode_seconds(runner: CudaRunner, batch: int, context: int, steps: int) -> float:
    """Median seconds of a step when each step follows the one before it on the device, as the overlapped loop runs them."""
    width = -(-(context + steps + 8) // BLOCK_SIZE)
    pending = None
    times = []
    for step in range(steps):
        tokens = [-1 - i for i in range(batch)] if pending is not None else [1] * batch
        launched = runner.launch(decode_batch([context + step] * batch, width, tokens), pending)
        if pending is not None:
            pending.result()
        times.append(time.perf_counter())
        pending = launched
    assert pending is not None
    pending.result()
    return statistics.median(np.diff(times[4:]).tolist())


def decode(bench: Bench) -> Iterator[Row]:
    """The goals: batch 1 of both shapes, and the large batch of the large one; then batch 1 again with early launch."""
    sizes, early = bench.sizes, replace(bench.settings, early=True)
    small, large = ("Qwen3-0.6B", sizes.small, 60.0), ("Llama-3.1-8B", sizes.large, 85.0)
    cases = [(small, bench.settings, 1, 64), (large, bench.settings, 1, 64)]
    cases += [(("Llama-3.1-8B", sizes.large, 70.0), bench.settings, sizes.batch, sizes.context)]
    if bench.settings.on_gpu:
        cases += [(small, early, 1, 64), (large, early, 1, 64)]
    return each((f"decode {case[0][0]}", partial(_decode, bench, *case)) for case in cases)


def batches(bench: Bench) -> Iterator[Row]:
    """What a step costs between one sequence and many, and what the short way of one or two is worth."""
    spec, longest = bench.sizes.small, 64 + bench.sizes.steps + 8
    width = -(-longest // BLOCK_SIZE)
    most = min(64, bench.sizes.batch)
    options = LoadOptions(n_blocks=most * width, max_rows=128, max_logit_rows=128)
    runner = random_runner(spec, options, bench.settings)
    for way in ("short", "usual"):
        for batch in (1, 2, 4, 8, 16, 64):
            if batch <= most:
                seconds = decode_seconds(runner, batch, 64, bench.sizes.steps)
                yield {"work": f"Qwen3-0.6B, batch {batch}, {way} way", "value": f"{1e3 * seconds:.3f} ms a step"}
        runner._single = runner.single_graphs = None
    runner.close()


def _decode(
    bench: Bench, model: tuple[str, DecoderSpec, float], settings: CudaSettings, batch: int, context: int
) -> Iterator[Row]:
    name, spec, goal = model
    label = ", early launch" if settings.early else ""
    steps = bench.sizes.steps
    width = -(-(context + steps + 8) // BLOCK_SIZE)
    rows = max(128, batch)
    runner = random_runner(spec, LoadOptions(n_blocks=batch * width, max_rows=rows, max_logit_rows=rows), settings)
    seconds = decode_seconds(runner, batch, context, steps)
    limit = read_bytes(spec, batch, context) / bench.measured()["copy_bytes_per_s"]
    graphs = [g for g in (runner.graphs, runner.single_graphs) if g is not None]
    yield {
        "work": f"decode batch {batch}, context {context}, {name} bf16{label}",
        "value": f"{1e3 * seconds:.3f} ms a step, {batch / seconds:,.0f} tokens/s",
        "of_limit_percent": 100 * limit / seconds,
        "goal_percent": goal,
        "replays": sum(g.replays for g in graphs),
    }
    runner.close()
    bench.tidy()


# ----------------------------------------------------------------- prefill


def prefill(bench: Bench) -> Iterator[Row]:
    """A long prompt in one step, by gathered keys and by pages; then in parts, as an engine serves it."""
    rows = bench.sizes.prompt
    cases = (("sdpa", rows), ("paged", rows), ("sdpa", max(1, rows // 4)))
    yield from each((f"prefill, {case}", partial(_prefill, bench, *case)) for case in cases)
    yield from each([("attention of a prompt", partial(_attention, bench))])


def _prefill(bench: Bench, prompts: Literal["sdpa", "paged"], part: int) -> Iterator[Row]:
    spec, rows = bench.sizes.large, bench.sizes.prompt
    limit = prefill_flops(spec, rows) / bench.measured()["gemm_flops_per_s"]
    options = LoadOptions(n_blocks=-(-rows // BLOCK_SIZE), max_rows=part, max_logit_rows=16)
    runner = random_runner(spec, options, replace(bench.settings, prompts=prompts))
    seconds = bench.seconds(lambda: _run_prompt(runner, rows, part), repeats=5, warm=2)
    row: Row = {
        "work": f"prefill {rows}, Llama-3.1-8B bf16, attention {prompts}"
        + (f", {part} at once" if part < rows else ""),
        "value": f"{1e3 * seconds:.1f} ms, {rows / seconds:,.0f} tokens/s; the largest step took "
        f"{runner.peak_step_bytes / 2**30:.2f} GiB",
        "of_limit_percent": 100 * limit / seconds,
    }
    yield row | ({"goal_percent": 55.0} if part == rows and prompts == "sdpa" else {})
    runner.close()
    bench.tidy()


def _run_prompt(runner: CudaRunner, rows: int, part: int) -> None:
    for start in range(0, rows, part):
        size = min(part, rows - start)
        runner.launch(_prompt_batch(start, size)).result()


def _prompt_batch(start: int, rows: int) -> StepBatch:
    return StepBatch(
        token_ids=np.arange(rows, dtype=np.int32) % 100,
        starts=np.array([start], np.int32),
        lengths=np.array([rows], np.int32),
        block_tables=np.arange(-(-(start + rows) // BLOCK_SIZE), dtype=np.int32)[None],
        logit_rows=np.array([rows - 1], np.int32),
        sampling=[GREEDY],
    )


def _attention(bench: Bench) -> Iterator[Row]:
    """One layer of a long prompt: whichever way is faster should serve."""
    spec, rows = bench.sizes.large, bench.sizes.prompt
    heads, kv_heads, dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
    blocks = -(-rows // BLOCK_SIZE)
    cache = torch.randn(blocks, 2, kv_heads, BLOCK_SIZE, dim, dtype=bench.dtype, device=bench.device)
    q = torch.randn(rows, heads, dim, dtype=bench.dtype, device=bench.device)
    shape = AttentionShape(heads, kv_heads, dim, dim**-0.5, 0, 0.0)
    times = {}
    for name, gather in (("pages", False), ("gathered keys", True)):
        ops = TritonOps(bench.dtype, heads // kv_heads, gather_prompts=gather)
        step = upload(plan_step(_prompt_batch(0, rows), ops.short_rows, ops.long_rows, ops.prompt_rows), bench.device)
        times[name] = bench.seconds(lambda: ops.attend(q, step, cache, shape), repeats=5, warm=1)  # noqa: B023  used at once
    value = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
    yield {"work": f"attention of one layer, prompt of {rows}", "value": value}


# ------------------------------------------------------------------- loops


def mix_requests(bench: Bench, count: int, seed: int, vocab: int) -> list[EngineRequest]:
    rng = np.random.default_rng(seed)
    low, high = bench.sizes.words
    return [
        EngineRequest(
            request_id=str(i),
            prompt_token_ids=tuple(rng.integers(0, vocab, int(rng.integers(low, high + 1))).tolist()),
            sampling=SamplingParams(
                temperature=0.6, seed=i, max_tokens=int(rng.integers(low, high + 1)), ignore_eos=True
            ),
        )
        for i in range(count)
    ]


def make_engine(bench: Bench, spec: DecoderSpec, parallel: int, n_ctx: int, max_rows: int, *, overlap: bool) -> Engine:
    """An engine over random weights."""
    n_blocks = parallel * -(-n_ctx // BLOCK_SIZE) + 1
    runner = random_runner(spec, LoadOptions(n_blocks, max_rows, parallel + 16), bench.settings)
    settings = EngineSettings(
        engine_id="bench", model="bench", n_ctx=n_ctx, max_running=parallel, max_rows=max_rows,
        max_logit_rows=parallel + 16, backend="cuda",
    )  # fmt: skip
    return OverlapEngine(runner, settings) if overlap else Engine(runner, settings)


def mix(bench: Bench) -> Iterator[Row]:
    """nano-vllm's offline mix, all graphs captured before."""
    count, spec = bench.sizes.requests, bench.sizes.small
    engine = make_engine(bench, spec, count, 2 * bench.sizes.words[1] + 16, 8 * bench.sizes.words[1], overlap=True)
    runner = engine._runner
    assert isinstance(runner, CudaRunner)
    began = time.perf_counter()
    with torch.inference_mode(), on_device(bench.settings):
        for graphs in (runner.graphs, runner.single_graphs):
            if graphs is not None:
                graphs.capture_all()
    collect(engine, mix_requests(bench, min(8, count), 1, spec.vocab_size))
    yield {"work": "mix: graphs captured and warm", "value": f"{time.perf_counter() - began:.1f} s"}
    requests = mix_requests(bench, count, 0, spec.vocab_size)
    began = time.perf_counter()
    done = collect(engine, requests)
    seconds = time.perf_counter() - began
    tokens = sum(len(entry.token_ids) for entry in done.values())
    followed = engine.followed if isinstance(engine, OverlapEngine) else 0
    yield {
        "work": f"offline mix, {count} requests, Qwen3-0.6B",
        "value": f"{tokens / seconds:,.0f} tokens/s in {seconds:.1f} s, {engine.metrics.steps} steps, {followed} launched ahead",
        "tokens_per_s": tokens / seconds,
    }
    engine.close()


def overlap(bench: Bench) -> Iterator[Row]:
    """How much of the host's time between two decode steps the overlapped loop hides."""
    times = {}
    steps, count = 3 * bench.sizes.steps, min(64, bench.sizes.batch)
    device = 0.0
    for ahead in (False, True):
        engine = make_engine(bench, bench.sizes.small, count, 512, 1024, overlap=ahead)
        for i in range(count):
            sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=400, ignore_eos=True)
            engine.add(EngineRequest(request_id=str(i), prompt_token_ids=tuple(range(64)), sampling=sampling))
        for _ in range(40):
            engine.step()
        stamps = []
        for _ in range(steps):
            engine.step()
            stamps.append(time.perf_counter())
        times[ahead] = statistics.median(np.diff(stamps).tolist())
        runner = engine._runner
        assert isinstance(runner, CudaRunner)
        if not ahead:
            device = decode_seconds(runner, count, 64 + 40, steps)
        engine.close()
        bench.tidy()
    host = max(times[False] - device, 1e-9)
    yield {
        "work": f"host time between decode steps hidden, {count} sequences",
        "value": f"{1e3 * device:.3f} ms a step of the runner alone, {1e3 * times[False]:.3f} ms plain, "
        f"{1e3 * times[True]:.3f} ms overlapped",
        "hidden_percent": 100 * min(1.0, max(0.0, (times[False] - times[True]) / host)),
        "goal_percent": 95.0,
    }
