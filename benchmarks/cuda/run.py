"""Everything about the GPU backend that needs a GPU, in one call: checks, errors, real models, times, serving.

    python benchmarks/cuda/run.py [--sections limits,kit,ops,quality,decode,prefill,overlap,mix,start,serve]
                                  [--model FILE ...] [--out FOLDER] [--budget 480]

Writes ``table.md`` and ``table.json``. A section that fails is a row of the table; a section for which the time is up is named as
not run. On a bare machine `go.sh` brings what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

Row = dict[str, object]
SECTIONS = ("limits", "kit", "ops", "quality", "decode", "prefill", "overlap", "mix", "start", "serve")
NEEDED = ("torch", "triton", "numpy", "msgspec", "tokenizers", "jinja2", "llguidance", "typer", "rich", "httpx2")


def missing_packages() -> list[str]:
    """Packages that the run cannot do without."""
    from importlib.util import find_spec

    return [name for name in NEEDED if find_spec(name) is None]


def main() -> int:
    """Run the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--model", type=Path, action="append", default=[], help="a real model, for quality and serve")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/cuda-bench")))
    parser.add_argument(
        "--budget", type=float, default=480.0, help="seconds; a section that would begin later is not run"
    )
    args = parser.parse_args()
    began = time.monotonic()
    chosen = args.sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: choose among {', '.join(SECTIONS)}")
    if missing := missing_packages():
        print(f"missing: {', '.join(missing)}. Install them, or see benchmarks/cuda/go.sh", file=sys.stderr)
        return 2
    from sagellm_backend.cuda import CudaBackend

    backend = CudaBackend()
    if reason := backend.available():
        print(f"the cuda backend cannot run here: {reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(backend.capability().instruction_set),
        "sections": {},
    }
    limits: dict[str, float] = {}
    for name in [section for section in SECTIONS if section in chosen]:
        section_began = time.monotonic()
        if section_began - began > args.budget:
            rows: list[Row] = [{"work": name, "value": f"not run: {args.budget:.0f} s were up", "ok": False}]
        else:
            rows = run_section(name, backend.settings, limits, args.model)
        result["sections"][name] = {"seconds": time.monotonic() - section_began, "rows": rows}
        (args.out / "table.json").write_text(json.dumps(result, indent=1))
        (args.out / "table.md").write_text(render(result))
        print(f"--- {name}: {time.monotonic() - section_began:.1f} s", flush=True)
        for row in rows:
            print("   ", row, flush=True)
    return 0 if all(judged(row) != "no" for s in result["sections"].values() for row in s["rows"]) else 1


def run_section(name: str, settings: object, limits: dict[str, float], models: list[Path]) -> list[Row]:
    """Rows of one section; what it raises is a row too."""
    try:
        return _section(name, settings, limits, models)()
    except Exception as error:  # noqa: BLE001  one section's failure must not hide the others' results
        traceback.print_exc()
        return [{"work": name, "value": f"failed: {type(error).__name__}: {error}"[:600], "ok": False}]


def _section(name: str, settings: object, limits: dict[str, float], models: list[Path]) -> Callable[[], list[Row]]:
    import checks
    import serve
    import speed

    from sagellm_backend.cuda.settings import CudaSettings

    assert isinstance(settings, CudaSettings)

    def measured() -> dict[str, float]:
        if not limits:
            limits.update(speed.measure_limits(settings.device))
        return limits

    def limit_rows() -> list[Row]:
        found = measured()
        return [
            {"work": "copy bandwidth (read and written)", "value": f"{found['copy_bytes_per_s'] / 1e12:.2f} TB/s"},
            {"work": "bf16 GEMM 8192³", "value": f"{found['gemm_flops_per_s'] / 1e12:.0f} TFLOP/s"},
        ]

    return {
        "limits": limit_rows,
        "kit": lambda: checks.kit_rows(settings),
        "ops": lambda: checks.op_rows(settings.device),
        "quality": lambda: checks.quality_rows(settings, models),
        "decode": lambda: speed.decode_rows(settings, measured()),
        "prefill": lambda: speed.prefill_rows(settings, measured()),
        "overlap": lambda: speed.overlap_rows(settings),
        "mix": lambda: speed.mix_rows(settings),
        "start": serve.start_rows,
        "serve": lambda: serve.serve_rows(models),
    }[name]


def describe(chip: str) -> str:
    """The machine and the versions that the numbers depend on."""
    import torch
    import triton

    return f"{chip}, torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"


def judged(row: Row) -> str:
    """Whether a row reaches its goal: yes, no, or empty where there is none."""
    reached = row.get("ok")
    for value, goal in (
        ("of_limit_percent", "goal_percent"),
        ("hidden_percent", "goal_percent"),
        ("ratio", "goal_ratio"),
    ):
        if value in row and goal in row:
            reached = float(str(row[value])) >= float(str(row[goal]))
    return "" if reached is None else "yes" if reached else "no"


def render(result: dict) -> str:
    """The table for docs/cuda.md."""
    lines = [
        f"{result['date']}, {result['machine']}",
        "",
        "| work | measured | against the limit | goal | reached |",
        "|---|---|---|---|---|",
    ]
    for section in result["sections"].values():
        for row in section["rows"]:
            share = next((f"{row[k]:.0f} %" for k in ("of_limit_percent", "hidden_percent") if k in row), "")
            share = f"{row['ratio']:.2f}×" if "ratio" in row else share
            goal = f"{row['goal_percent']:.0f} %" if "goal_percent" in row else row.get("goal", "")
            goal = f"{row['goal_ratio']:g}×" if "goal_ratio" in row else goal
            value = str(row["value"]).replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {row['work']} | {value} | {share} | {goal} | {judged(row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
