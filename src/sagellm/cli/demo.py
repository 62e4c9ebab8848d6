"""``sage-llm demo``: measure this machine by the year's workload, write the numbers, judge them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sagellm.cli import engine_flags as flags
from sagellm.cli.common import JsonOption, print_json, print_table, single


def demo(
    workload: Annotated[str, typer.Option("--workload", "-w", help="year1, year2 or year3.")] = "year1",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the numbers go.")] = Path("metrics.json"),
    model: Annotated[str | None, typer.Option("--model", "-m", help="What to run [smollm2:135m].")] = None,
    as_json: Annotated[bool, JsonOption] = False,
    mock: flags.Mock = False,
    mock_scale: flags.MockSpeed = None,
    backend: flags.Backend = None,
    threads: flags.Threads = None,
    quant: flags.Quant = None,
    kv_dtype: flags.KvDtype = None,
    spec: flags.Spec = None,
    draft_model: flags.DraftModel = None,
) -> None:
    """Run three segments (short, long, stress), write every number, and judge them. Exit status 1 below a threshold."""
    from sagellm.demo import run_demo

    chosen = model or ("mock" if mock else "smollm2:135m")
    flags.ensure_model(chosen)
    changes = flags.engine_changes(
        model=chosen,
        mock=mock,
        backend=backend,
        threads=threads,
        quant=quant,
        kv_dtype=kv_dtype,
        spec=spec,
        draft_model=draft_model,
        mock_scale=mock_scale,
    )
    say = (lambda _name: None) if as_json else (lambda name: print(f"segment {name} …", flush=True))
    result = asyncio.run(run_demo(workload, chosen, changes, say))
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
    else:
        _show(result, output)
    if not result["passed"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any], output: Path) -> None:
    from sagellm.demo import AT_LEAST, METRICS

    rows = []
    for name in METRICS:
        bound = result["thresholds"].get(name)
        sign = "≥" if name in AT_LEAST else "≤"
        verdict = "" if bound is None else "ok" if result["verdicts"][name] else "MISSED"
        rows.append((name, f"{result[name]:g}", "" if bound is None else f"{sign} {bound:g}", verdict))
    print_table(("METRIC", "MEASURED", "WANTED", ""), rows)
    print(
        f"{result['workload']} on {result['model']}: {'passed' if result['passed'] else 'MISSED'}; written to {output}"
    )


app = single(demo)
