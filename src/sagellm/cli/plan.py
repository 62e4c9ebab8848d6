"""``sage-llm plan``: what an engine would need in memory, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sagellm.cli import engine_flags as flags
from sagellm.cli.common import JsonOption, print_json, single


def plan(
    model: Annotated[str, typer.Argument(help="A name (smollm2:135m) or a path (./model.gguf).")],
    ctx: flags.Ctx = None,
    parallel: flags.Parallel = None,
    max_batch_tokens: flags.MaxBatchTokens = None,
    memory: flags.Memory = None,
    backend: flags.Backend = None,
    quant: flags.Quant = None,
    kv_dtype: flags.KvDtype = None,
    kv_size: flags.KvBytes = None,
    spec: flags.Spec = None,
    draft_model: flags.DraftModel = None,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Show what an engine would need in memory against what is free; exit with 1 if it does not fit."""
    from sagellm import compose
    from sagellm_core.build import plan_engine

    changes = flags.engine_changes(
        ctx=ctx,
        parallel=parallel,
        max_batch_tokens=max_batch_tokens,
        memory=memory,
        backend=backend,
        quant=quant,
        kv_dtype=kv_dtype,
        kv_bytes=kv_size,
        spec=spec,
        draft_model=draft_model,
    )
    needed = plan_engine(compose.engine_config(model, changes))
    if as_json:
        print_json({**asdict(needed), "total_bytes": needed.total_bytes, "fits": needed.fits})
    else:
        print(needed.render())


app = single(plan)
