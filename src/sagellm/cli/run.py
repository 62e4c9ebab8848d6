"""``sage-llm run``: a model in this process, answering in the terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer

from sagellm import store
from sagellm.cli import engine_flags as flags
from sagellm.cli.common import human_bytes, single
from sagellm_protocol.errors import InvalidArgumentError

# A small model that is told what it is answers in the language that it is asked in.
DEFAULT_SYSTEM = "You are a helpful AI assistant."


def run(
    model: Annotated[str, typer.Argument(help="A name (smollm2:135m) or a path (./model.gguf).")] = "",
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, standard input is read.")] = None,
    system: Annotated[str, typer.Option(help="System message; empty for the template's own.")] = DEFAULT_SYSTEM,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="0 is greedy [what the model's makers recommend].")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Share of the probability to draw from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from that many most likely tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Report times, rates and memory at the end.")
    ] = False,
    mock: flags.Mock = False,
    ctx: flags.Ctx = None,
    parallel: flags.Parallel = None,
    memory: flags.Memory = None,
    backend: flags.Backend = None,
    threads: flags.Threads = None,
    quant: flags.Quant = None,
    kv_dtype: flags.KvDtype = None,
    spec: flags.Spec = None,
    draft_model: flags.DraftModel = None,
    mock_scale: flags.MockSpeed = None,
    script: flags.Script = None,
) -> None:
    """Chat with a model, or answer one prompt."""
    if mock and prompt is None and not _names_a_model(model):
        model, prompt = "mock", model or None  # `run --mock "hello"`: the only word is the prompt
    if not model:
        raise typer.BadParameter(
            "name a model, such as smollm2:135m (sage-llm list shows what is here)", param_hint="MODEL"
        )
    flags.ensure_model(model)
    changes = flags.engine_changes(
        ctx=ctx,
        parallel=parallel,
        memory=memory,
        backend="mock" if mock and model != "mock" else backend,
        threads=threads,
        quant=quant,
        kv_dtype=kv_dtype,
        spec=spec,
        draft_model=draft_model,
        mock_scale=mock_scale,
        script=script,
    )
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "max_tokens": max_tokens}
    if prompt is None:
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise InvalidArgumentError(
            'the prompt is empty: sage-llm run MODEL "your question", or pipe it in', param="prompt"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    asyncio.run(_answer(model, changes, messages, options, verbose=verbose))


def _names_a_model(text: str) -> bool:
    return bool(text) and (text == "mock" or store.layout.looks_like_path(text) or " " not in text)


async def _answer(
    model: str, changes: dict[str, Any], messages: list[dict[str, str]], options: dict[str, Any], *, verbose: bool
) -> None:
    from sagellm.async_client import AsyncUnifiedInferenceClient
    from sagellm.cli.meter import Meter

    meter = Meter()
    async with AsyncUnifiedInferenceClient.create(
        default_llm_model=model, embedded=True, engine=changes, timeout=None
    ) as client:
        await client.models()  # loads the engine
        meter.asked()
        stream = await client.chat(messages, stream=True, stream_options={"include_usage": True}, **options)
        async for delta in stream:
            meter.saw(delta)
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    if verbose:
        sys.stderr.write(meter.report(human_bytes) + "\n")


app = single(run)
