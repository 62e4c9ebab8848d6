"""``sage-llm serve``: gateway and control plane in this process, each engine in one of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm.cli import engine_flags as flags
from sagellm.cli.common import single
from sagellm_protocol.errors import InvalidArgumentError


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Names or paths; NAME=PATH serves a path under a name [smollm2:135m].")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel="Network")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel="Network")
    ] = 8889,
    name: Annotated[str | None, typer.Option(help="Serve the (only) model under this name.")] = None,
    engines: Annotated[int, typer.Option(min=1, help="Engine processes for each model.")] = 1,
    policy: Annotated[
        str, typer.Option(help="Scheduling policy of the control plane.", rich_help_panel="Control plane")
    ] = "adaptive",
    mock: flags.Mock = False,
    ctx: flags.Ctx = None,
    parallel: flags.Parallel = None,
    max_batch_tokens: flags.MaxBatchTokens = None,
    memory: flags.Memory = None,
    backend: flags.Backend = None,
    threads: flags.Threads = None,
    quant: flags.Quant = None,
    kv_dtype: flags.KvDtype = None,
    kv_bytes: flags.KvBytes = None,
    spill: flags.Spill = None,
    spill_bytes: flags.SpillBytes = None,
    no_prefix_cache: flags.NoPrefixCache = False,
    spec: flags.Spec = None,
    draft_model: flags.DraftModel = None,
    mock_scale: flags.MockSpeed = None,
    script: flags.Script = None,
) -> None:
    """Serve models over HTTP: OpenAI-compatible, http://127.0.0.1:8889/v1."""
    from sagellm.cli.server_process import ServeOptions, serve_until_stopped

    changes = flags.engine_changes(
        ctx=ctx,
        parallel=parallel,
        max_batch_tokens=max_batch_tokens,
        memory=memory,
        backend="mock" if mock and models else backend,
        threads=threads,
        quant=quant,
        kv_dtype=kv_dtype,
        kv_bytes=kv_bytes,
        spill=spill,
        spill_bytes=spill_bytes,
        no_prefix_cache=no_prefix_cache,
        spec=spec,
        draft_model=draft_model,
        mock_scale=mock_scale,
        script=script,
    )
    wanted = models or (["mock"] if mock else ["smollm2:135m"])
    if name is not None and len(wanted) != 1:
        raise InvalidArgumentError(
            f"--name names one model, {len(wanted)} are given: write NAME=PATH for each", param="name"
        )
    chosen = [_split(model, name) for model in wanted]
    for _, model in chosen:
        flags.ensure_model(model)
    serve_until_stopped(
        ServeOptions(host=host, port=port, models=tuple(chosen), engines=engines, policy=policy, changes=changes)
    )


def _split(text: str, name: str | None) -> tuple[str | None, str]:
    given, equals, path = text.partition("=")
    return (given, path) if equals else (name, text)


app = single(serve)
