"""Times on the GPU: the machine's limits, decode, prefill, the overlapped loop, and a mix of requests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from shapes import LLAMA_8B, QWEN3_06B, SHAPES, prefill_flops, random_runner, read_bytes

from sagellm_backend.base import BLOCK_SIZE, LoadOptions, RowSampling, StepBatch
from sagellm_backend.cuda.runner import CudaRunner
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.spec import DecoderSpec
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.overlap import OverlapEngine
from sagellm_core.testing import collect
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams

GREEDY = RowSampling(params=SamplingParams(temperature=0.0))
Row = dict[str, object]


def device_seconds(run: Callable[[], object], repeats: int = 20, warm: int = 3) -> float:
    """Median time of `run` on the device."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_limits(device: str) -> dict[str, float]:
    """Copy bandwidth (bytes read and written together) and bf16 GEMM rate of this machine, now."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / device_seconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    gemm = 2 * 8192**3 / device_seconds(lambda: a @ b)
    return {"copy_bytes_per_s": copy, "gemm_flops_per_s": gemm}


def decode_batch(contexts: list[int], width: int, tokens: list[int], draws: bool = True) -> StepBatch:
    """One row for each of sequences that lie one after another in the cache."""
    n = len(contexts)
    return StepBatch(
        token_ids=np.array(tokens, np.int32),
        starts=np.array(contexts, np.int32),
        lengths=np.ones(n, np.int32),
        block_tables=np.arange(n * width, dtype=np.int32).reshape(n, width),
        logit_rows=np.arange(n, dtype=np.int32),
        sampling=[GREEDY] * n if draws else [],
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
    pending.result()
    return statistics.median(np.diff(times[4:]).tolist())


def decode_rows(settings: CudaSettings, limits: dict[str, float]) -> list[Row]:
    """Batch 1 of both shapes, and batch 256 at context 1k of the large one."""
    out: list[Row] = []
    cases = [("Qwen3-0.6B", 1, 64, 60.0), ("Llama-3.1-8B", 1, 64, 85.0), ("Llama-3.1-8B", 256, 1024, 70.0)]
    for name, batch, context, goal in cases:
        spec = SHAPES[name]
        width = -(-(context + 72) // BLOCK_SIZE)
        options = LoadOptions(n_blocks=batch * width + 1, max_rows=512, max_logit_rows=512)
        runner = random_runner(spec, options, settings)
        seconds = decode_seconds(runner, batch, context, 64)
        limit = read_bytes(spec, batch, context) / limits["copy_bytes_per_s"]
        out.append(
            {
                "work": f"decode batch {batch}, context {context}, {name} bf16",
                "value": f"{1e3 * seconds:.3f} ms a step, {batch / seconds:,.0f} tokens/s",
                "of_limit_percent": 100 * limit / seconds,
                "goal_percent": goal,
                "replays": runner.graphs.replays if runner.graphs else 0,
            }
        )
        runner.close()
        del runner
        torch.cuda.empty_cache()
    return out


def prefill_rows(settings: CudaSettings, limits: dict[str, float]) -> list[Row]:
    """8,192 rows of one prompt in one step, with our attention."""
    rows = 8192
    options = LoadOptions(n_blocks=rows // BLOCK_SIZE + 1, max_rows=rows, max_logit_rows=16)
    runner = random_runner(LLAMA_8B, options, settings)
    batch = StepBatch(
        token_ids=np.ones(rows, np.int32),
        starts=np.zeros(1, np.int32),
        lengths=np.array([rows], np.int32),
        block_tables=np.arange(rows // BLOCK_SIZE, dtype=np.int32)[None],
        logit_rows=np.array([rows - 1], np.int32),
        sampling=[GREEDY],
    )
    seconds = device_seconds(lambda: runner.launch(batch).result(), repeats=5, warm=2)
    peak = runner.peak_step_bytes
    runner.close()
    torch.cuda.empty_cache()
    limit = prefill_flops(LLAMA_8B, rows) / limits["gemm_flops_per_s"]
    return [
        {
            "work": "prefill 8k, Llama-3.1-8B bf16",
            "value": f"{1e3 * seconds:.1f} ms, {rows / seconds:,.0f} tokens/s; the largest step took {peak / 2**30:.2f} GiB",
            "of_limit_percent": 100 * limit / seconds,
            "goal_percent": 55.0,
        },
        *_attention_choice(settings.device),
    ]


def _attention_choice(device: str) -> list[Row]:
    """Our paged attention against torch's for one layer of a whole prompt of 8k: whichever is faster should serve prefill."""
    from sagellm_backend.cuda.ops import AttentionShape
    from sagellm_backend.cuda.plan import plan_step, upload
    from sagellm_backend.cuda.triton_ops import TritonOps

    rows, heads, kv_heads, dim = 8192, 32, 8, 128
    ops = TritonOps(torch.bfloat16, heads // kv_heads)
    blocks = rows // BLOCK_SIZE
    cache = torch.randn(blocks, 2, kv_heads, BLOCK_SIZE, dim, dtype=torch.bfloat16, device=device)
    q = torch.randn(rows, heads, dim, dtype=torch.bfloat16, device=device)
    batch = StepBatch(
        token_ids=np.ones(rows, np.int32),
        starts=np.zeros(1, np.int32),
        lengths=np.array([rows], np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        logit_rows=np.zeros(0, np.int32),
        sampling=[],
    )
    step = upload(plan_step(batch, ops.short_rows, ops.long_rows), device)
    shape = AttentionShape(heads, kv_heads, dim, dim**-0.5, 0, 0.0)
    ours = device_seconds(lambda: ops.attend(q, step, cache, shape), repeats=10)
    k, v = (torch.randn(1, heads, rows, dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    wide = q.transpose(0, 1)[None].contiguous()
    theirs = device_seconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(wide, k, v, is_causal=True), repeats=10
    )
    return [
        {
            "work": "attention of one layer, prompt of 8k",
            "value": f"{1e3 * ours:.2f} ms; torch's SDPA {1e3 * theirs:.2f} ms",
        }
    ]


def _requests(count: int, seed: int, vocab: int) -> list[EngineRequest]:
    rng = np.random.default_rng(seed)
    return [
        EngineRequest(
            request_id=str(i),
            prompt_token_ids=tuple(rng.integers(0, vocab, int(rng.integers(100, 1025))).tolist()),
            sampling=SamplingParams(temperature=0.6, seed=i, max_tokens=int(rng.integers(100, 1025)), ignore_eos=True),
        )
        for i in range(count)
    ]


def make_engine(spec: DecoderSpec, settings: CudaSettings, parallel: int, n_ctx: int, *, overlap: bool) -> Engine:
    """An engine over random weights."""
    n_blocks = parallel * -(-n_ctx // BLOCK_SIZE) + 1
    options = LoadOptions(n_blocks=n_blocks, max_rows=8192, max_logit_rows=parallel + 16)
    runner = random_runner(spec, options, settings)
    engine_settings = EngineSettings(
        engine_id="bench",
        model="bench",
        n_ctx=n_ctx,
        max_running=parallel,
        max_rows=8192,
        max_logit_rows=parallel + 16,
        backend="cuda",
    )
    return OverlapEngine(runner, engine_settings) if overlap else Engine(runner, engine_settings)


def mix_rows(settings: CudaSettings, count: int = 256) -> list[Row]:
    """nano-vllm's offline mix, and transformers' continuous batching on the same requests where it is installed."""
    engine = make_engine(QWEN3_06B, settings, 256, 2064, overlap=True)
    collect(engine, _requests(8, 1, QWEN3_06B.vocab_size))
    requests = _requests(count, 0, QWEN3_06B.vocab_size)
    begin = time.perf_counter()
    done = collect(engine, requests)
    seconds = time.perf_counter() - begin
    tokens = sum(len(entry.token_ids) for entry in done.values())
    engine.close()
    torch.cuda.empty_cache()
    ours = tokens / seconds
    row: Row = {
        "work": f"offline mix, {count} requests, Qwen3-0.6B",
        "value": f"{ours:,.0f} tokens/s in {seconds:.1f} s",
    }
    theirs = _transformers_rate(requests, settings.device)
    if isinstance(theirs, str):
        row["value"] = f"{row['value']}; {theirs}"
    else:
        row |= {
            "value": f"{row['value']}; transformers {theirs:,.0f} tokens/s",
            "ratio": ours / theirs,
            "goal_ratio": 3.0,
        }
    return [row]


def _transformers_rate(requests: list[EngineRequest], device: str) -> float | str:
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config
    except ImportError as error:
        return f"transformers is not there ({error})"
    spec = QWEN3_06B
    config = Qwen3Config(
        hidden_size=spec.d_model,
        intermediate_size=spec.d_ff,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").to(device).eval()
    # A quarter of the requests is enough for a rate, and leaves time for the rest of the run.
    part = requests[::4]
    most = max(r.sampling.max_tokens or 0 for r in part)
    generation = GenerationConfig(max_new_tokens=most, do_sample=True, temperature=0.6, eos_token_id=-1, pad_token_id=0)
    begin = time.perf_counter()
    outputs = model.generate_batch(inputs=[list(r.prompt_token_ids) for r in part], generation_config=generation)
    seconds = time.perf_counter() - begin
    return sum(len(out.generated_tokens) for out in outputs.values()) / seconds


def overlap_rows(settings: CudaSettings) -> list[Row]:
    """How much of the host's time between two decode steps the overlapped loop hides."""
    times = {}
    for overlap in (False, True):
        engine = make_engine(QWEN3_06B, settings, 64, 512, overlap=overlap)
        for i in range(64):
            sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=300, ignore_eos=True)
            engine.add(EngineRequest(request_id=str(i), prompt_token_ids=tuple(range(64)), sampling=sampling))
        for _ in range(40):
            engine.step()
        stamps = []
        for _ in range(150):
            engine.step()
            stamps.append(time.perf_counter())
        times[overlap] = statistics.median(np.diff(stamps).tolist())
        runner = engine._runner
        assert isinstance(runner, CudaRunner)
        if not overlap:
            batch = decode_batch([256] * 64, 32, [1] * 64)
            device = device_seconds(lambda: runner.launch(batch), repeats=30)  # noqa: B023  used before it changes
        engine.close()
        torch.cuda.empty_cache()
    host = max(times[False] - device, 1e-9)
    hidden = 100 * min(1.0, max(0.0, (times[False] - times[True]) / host))
    value = (
        f"{1e3 * device:.3f} ms on the device, {1e3 * times[False]:.3f} ms plain, {1e3 * times[True]:.3f} ms overlapped"
    )
    return [
        {
            "work": "host time between decode steps hidden, 64 sequences",
            "value": value,
            "hidden_percent": hidden,
            "goal_percent": 95.0,
        }
    ]
