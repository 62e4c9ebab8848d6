"""``sage-llm bench``: serve, latency, throughput, quality, compare."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from sagellm.cli import engine_flags as flags
from sagellm.cli.common import JsonOption, new_app, print_json, print_table
from sagellm_protocol.errors import InvalidArgumentError

app = new_app()

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="An OpenAI-compatible server, such as http://127.0.0.1:8889/v1 [the engine in this process]."
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        help="As the server names it, or what to load here [the server's first chat model, or smollm2:135m]."
    ),
]
Requests = Annotated[int, typer.Option(min=1, help="How many requests.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Prompt length, tokens (about).")]
OutputTokens = Annotated[int, typer.Option(min=1, help="Output length, tokens (exactly).")]
Shared = Annotated[int, typer.Option("--shared-prefix", min=0, help="Tokens at the beginning that all prompts share.")]
Warmup = Annotated[int, typer.Option(min=0, help="Requests before the measured ones.")]
Seed = Annotated[int, typer.Option(help="The same seed sends the same prompts at the same times.")]
Out = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for run.json, requests.csv and plot.svg.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="Bearer token for --url [SAGE_UNIFIED_API_KEY, else your own server's].")
]
SloTtft = Annotated[float, typer.Option("--slo-ttft", help="Milliseconds to the first token that count as good.")]
SloTpot = Annotated[float, typer.Option("--slo-tpot", help="Milliseconds for each later token that count as good.")]
Extra = Annotated[
    list[str] | None, typer.Option("--extra", help="Further field of every request, NAME=JSON; repeatable.")
]


@app.callback()
def bench() -> None:
    """Measure a server or an engine: TTFT, TPOT, ITL and E2E at p50-p99, goodput, errors."""


@app.command()
def serve(
    model: Model = "",
    url: Url = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second (open loop).")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="How they arrive at --rate: poisson or constant [poisson].")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Replay a trace: Mooncake .jsonl or Azure .csv (open loop).")
    ] = None,
    speedup: Annotated[float | None, typer.Option(min=0.001, help="Replay the trace that much faster [1].")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="That many at a time (closed loop).")] = None,
    requests: Requests = 100,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Prompt length, tokens (about) [128].")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="Output length, tokens (exactly) [64].")] = None,
    longest: Annotated[
        int | None, typer.Option(min=1, help="Cut the trace's prompts and outputs to that many tokens [2048].")
    ] = None,
    shared_prefix: Annotated[
        int | None, typer.Option(min=0, help="Tokens at the beginning that all prompts share [0].")
    ] = None,
    warmup: Warmup = 4,
    seed: Seed = 0,
    slo_ttft: SloTtft = 2000.0,
    slo_tpot: SloTpot = 60.0,
    output: Out = None,
    api_key: ApiKey = None,
    extra: Extra = None,
    as_json: Annotated[bool, JsonOption] = False,
    mock: flags.Mock = False,
    mock_scale: flags.MockSpeed = None,
) -> None:
    """Load a server as users do: arrivals at a rate, a trace, or a fixed number at a time."""
    from sagellm.bench import workload as work

    if sum(x is not None for x in (rate, trace, concurrency)) != 1:
        raise InvalidArgumentError("choose one of --rate, --trace and --concurrency")
    if pattern not in {None, "poisson", "constant"} or (pattern and rate is None):
        raise InvalidArgumentError(
            f"--pattern {pattern}: it is poisson or constant, and belongs to --rate", param="pattern"
        )
    of_trace = {"speedup": speedup, "longest": longest}
    of_rest = {"prompt-tokens": prompt_tokens, "output-tokens": output_tokens, "shared-prefix": shared_prefix}
    for name, value in (of_trace if trace is None else of_rest).items():
        if value is not None:
            what = "the trace says how long requests are" if trace is not None else "it belongs to --trace"
            raise InvalidArgumentError(f"--{name}: {what}: drop it", param=name)
    sizes = {
        "prompt_tokens": prompt_tokens or 128,
        "output_tokens": output_tokens or 64,
        "shared_tokens": shared_prefix or 0,
        "seed": seed,
    }
    if rate is not None:
        load = work.open_loop(requests=requests, rate=rate, evenly=pattern == "constant", **sizes)
    elif trace is not None:
        load = work.trace(trace, requests=requests, speedup=speedup or 1.0, longest=longest or 2048, seed=seed)
    else:
        load = work.closed_loop(requests=requests, concurrency=concurrency or 1, **sizes)
    _measure("serve", model, url, load, warmup, (slo_ttft, slo_tpot), output, api_key, extra, as_json, mock, mock_scale)


@app.command()
def latency(
    model: Model = "",
    url: Url = None,
    requests: Requests = 10,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 128,
    warmup: Warmup = 2,
    seed: Seed = 0,
    slo_ttft: SloTtft = 2000.0,
    slo_tpot: SloTpot = 60.0,
    output: Out = None,
    api_key: ApiKey = None,
    extra: Extra = None,
    as_json: Annotated[bool, JsonOption] = False,
    mock: flags.Mock = False,
    mock_scale: flags.MockSpeed = None,
) -> None:
    """One request at a time: what a single user feels."""
    from sagellm.bench.workload import closed_loop

    load = closed_loop(
        requests=requests, concurrency=1, prompt_tokens=prompt_tokens, output_tokens=output_tokens, seed=seed
    )
    _measure(
        "latency", model, url, load, warmup, (slo_ttft, slo_tpot), output, api_key, extra, as_json, mock, mock_scale
    )


@app.command()
def throughput(
    model: Model = "",
    url: Url = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 16,
    requests: Requests = 64,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 128,
    shared_prefix: Shared = 0,
    warmup: Warmup = 2,
    seed: Seed = 0,
    slo_ttft: SloTtft = 2000.0,
    slo_tpot: SloTpot = 60.0,
    output: Out = None,
    api_key: ApiKey = None,
    extra: Extra = None,
    as_json: Annotated[bool, JsonOption] = False,
    mock: flags.Mock = False,
    mock_scale: flags.MockSpeed = None,
) -> None:
    """As many tokens a second as it will give."""
    from sagellm.bench.workload import closed_loop

    load = closed_loop(
        requests=requests,
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        shared_tokens=shared_prefix,
        seed=seed,
    )
    _measure(
        "throughput", model, url, load, warmup, (slo_ttft, slo_tpot), output, api_key, extra, as_json, mock, mock_scale
    )


@app.command()
def quality(
    model: Annotated[str, typer.Argument(help="A name (smollm2:135m) or a path (./model.gguf).")] = "smollm2:135m",
    quant: Annotated[
        list[str] | None, typer.Option("--quant", help="Precision to judge; repeatable [auto, q8, bf16].")
    ] = None,
    kv_dtype: flags.KvDtype = None,
    backend: Annotated[str, typer.Option(help="Backend of the judged paths.")] = "cpu",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to score.")] = 20_000,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text [Python's language reference].")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of the judged paths; 0 is as many as there are.")] = 0,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Perplexity, KL and top-1 agreement of quantised paths against float32 on the same weights."""
    from dataclasses import asdict

    import msgspec

    from sagellm import store
    from sagellm.bench.quality import QualityPath, measure_quality

    try:
        paths = [
            msgspec.convert({"quant": name, "kv_dtype": kv_dtype or "auto", "backend": backend}, QualityPath)
            for name in quant or ["auto", "q8", "bf16"]
        ]
    except msgspec.ValidationError as error:
        raise InvalidArgumentError(f"--quant or --kv-dtype: {error}", param="quant") from error
    flags.ensure_model(model)
    shown = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if shown:
            sys.stderr.write(f"\r{done} of {total} tokens" + ("\n" if done == total else ""))

    report = measure_quality(
        store.resolve(model).path,
        paths,
        text=text.read_text(encoding="utf-8") if text is not None else None,
        max_tokens=tokens,
        threads=threads,
        progress=progress,
    )
    if as_json:
        print_json(asdict(report))
    else:
        print(report.table())


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Folder or run.json of the first run.")],
    b: Annotated[Path, typer.Argument(help="Folder or run.json of the second run.")],
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Set two runs side by side; within 2 % counts as the same."""
    from sagellm.bench.compare import compare as rows_of
    from sagellm.bench.compare import differences, load_run

    one, two = load_run(a), load_run(b)
    rows = rows_of(one, two)
    if as_json:
        print_json([{"measure": n, "a": x, "b": y, "ratio": r, "verdict": v} for n, x, y, r, v in rows])
        return
    for line in differences(one, two):
        print(f"note: not the same experiment: {line}")
    print_table(
        ("MEASURE", "A", "B", "B/A", ""),
        [(n, f"{x:g}", f"{y:g}", f"{r:.3f}" if r is not None else "-", v) for n, x, y, r, v in rows],
    )


def _measure(
    kind: str,
    model: str,
    url: str | None,
    load: Any,
    warmup: int,
    slo_ms: tuple[float, float],
    output: Path | None,
    api_key: str | None,
    extra: list[str] | None,
    as_json: bool,
    mock: bool,
    mock_scale: float | None,
) -> None:
    from sagellm.bench import report

    if (mock or mock_scale is not None) and url:
        raise InvalidArgumentError(
            "--mock and --mock-scale simulate an engine here, --url names a server: drop one of them", param="mock"
        )
    if api_key and not url:
        raise InvalidArgumentError("--api-key is of a server: pass --url with it, or drop it", param="api_key")
    model = model or ("mock" if mock else "" if url else "smollm2:135m")
    if url is None:
        flags.ensure_model(model)
    changes = flags.engine_changes(model=model, mock=mock, mock_scale=mock_scale)
    records, served = asyncio.run(_run(model, url, load, warmup, api_key, _fields(extra), changes))
    slo = report.SLO(slo_ms[0] / 1000, slo_ms[1] / 1000)
    run = {
        "kind": kind,
        "model": served,
        "target": url or "embedded",
        "workload": load.name,
        "requests": len(load.arrivals),
        "prompt_tokens": load.arrivals[0].prompt_tokens,
        "output_tokens": load.arrivals[0].output_tokens,
        "seed": load.seed,
        "at": int(time.time()),
        "summary": report.summarize(records, slo),
    }
    if output is not None:
        report.write(output, run, records)
    if as_json:
        print_json(run)
    else:
        print(f"{kind}: {served} at {run['target']}, {load.name}")
        print(report.table(run["summary"]))
        if output is not None:
            print(f"written: {output}/run.json, requests.csv, plot.svg")
    if all(not record.ok for record in records):
        raise typer.Exit(1)


async def _run(
    model: str,
    url: str | None,
    load: Any,
    warmup: int,
    api_key: str | None,
    fields: dict[str, Any],
    changes: dict[str, Any],
) -> tuple[list[Any], str]:
    from sagellm.async_client import first_model_of, with_v1
    from sagellm.bench.runner import run_workload
    from sagellm.cli.admin import key_for
    from sagellm.embedded import EmbeddedTransport
    from sagellm.transport import HttpTransport, RetryPolicy, Timeouts, Transport

    transport: Transport
    if url is None:
        embedded = await EmbeddedTransport.start(model, engine=changes)
        transport, model = embedded, embedded.model
    else:
        base = url if urlsplit(url).path.strip("/") else with_v1(url)
        transport = HttpTransport(
            base,
            api_key=key_for(base, api_key),
            timeouts=Timeouts(total=600, between_events=600),
            retries=RetryPolicy(attempts=1),
        )
    shown = sys.stderr.isatty()

    def progress(done: int) -> None:
        if shown:
            sys.stderr.write(f"\r{done} of {len(load.arrivals)}" + ("\n" if done == len(load.arrivals) else ""))

    try:
        model = model or await first_model_of(transport, "chat")
        return await run_workload(transport, model, load, warmup=warmup, options=fields, on_done=progress), model
    finally:
        await transport.close()


def _fields(extra: list[str] | None) -> dict[str, Any]:
    import json

    out = {}
    for text in extra or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidArgumentError(f"--extra {text!r}: write NAME=JSON, such as temperature=0.7", param="extra")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out
