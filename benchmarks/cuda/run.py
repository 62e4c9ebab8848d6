"""Everything about the GPU backend that needs a GPU, in one call: checks, errors, real models, times, serving.

    python benchmarks/cuda/run.py [--sections probe,limits,ops,...] [--model FILE ...] [--out FOLDER] [--budget 470] [--rehearse]

Sections run one after another, those that only check beside each other, each in a process of its own with a time limit of its own.
Their rows and all that they print are in ``rows.jsonl`` and ``log.txt`` as soon as they are there, ``table.md`` and ``table.json``
after each section: whatever ends the run early, what was found stays. ``--rehearse`` runs every line at a tiny size without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

Row = dict[str, object]
NEEDED = ("torch", "triton", "numpy", "msgspec", "tokenizers", "jinja2", "llguidance", "typer", "rich", "httpx2")

CHECKS = (
    *("ops-small", "ops-single", "ops-attention", "ops-chained", "ops-products", "ops-draws"),
    *("kit-f32", "kit-bf16", "kit-fixed", "quality"),
)
STAGES: tuple[dict[str, float], ...] = (
    {"probe": 20},
    {"limits": 40},
    dict.fromkeys(CHECKS, 170),
    {"decode": 110},
    {"prefill": 60},
    {"overlap": 50},
    {"start": 60},
    {"serve": 90},
    {"mix": 80},
    {"peer": 100},
    {"batches": 40},
    {"tune": 100},
)
"""Sections and their seconds, the most valuable first; those of one stage run beside each other."""
_PATIENCE = 8
"""Times as long may a section take in a rehearsal, where kernels are interpreted."""


@dataclass
class Run:
    """What was found so far.

    Attributes:
        out: where it is written.
        rehearse: without a GPU.
        models: real models.
        began: when, by the monotonic clock.
        budget: seconds of all sections together.
        seconds: of each section that ran.
    """

    out: Path
    rehearse: bool
    models: list[Path]
    budget: float
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rows_file(self) -> Path:
        """A line of JSON for each row."""
        return self.out / "rows.jsonl"

    def left(self) -> float:
        """Seconds that may still be used."""
        return self.budget - (time.monotonic() - self.began)

    def rows(self) -> list[Row]:
        """All rows so far; a last line that was cut is left out."""
        if not self.rows_file.exists():
            return []
        lines = self.rows_file.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def add(self, section: str, **row: object) -> None:
        """Write a row."""
        with self.rows_file.open("a", encoding="utf-8") as file:
            print(json.dumps({"section": section} | row), file=file)

    def stage(self, sections: dict[str, float]) -> None:
        """Run sections beside each other, each until its limit."""
        began, left = time.monotonic(), self.left()
        for name, process in {name: self._start(name) for name in sections}.items():
            limit = min(sections[name] * (_PATIENCE if self.rehearse else 1), left)
            try:
                code = process.wait(max(began + limit - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.add(name, work=name, value=f"cut after {limit:.0f} s", ok=False)
            else:
                # 1 with rows is a section that failed and said so itself.
                if code not in (0, 1) or (code and not any(row["section"] == name for row in self.rows())):
                    self.add(name, work=name, value=f"the process ended with {code}: see log.txt", ok=False)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        found = next((row["limits"] for row in self.rows() if "limits" in row), {})
        argv = [sys.executable, str(Path(__file__).with_name("section.py")), name, "--rows", str(self.rows_file)]
        argv += ["--limits", json.dumps(found), *(["--rehearse"] if self.rehearse else [])]
        for model in self.models:
            argv += ["--model", str(model)]
        environment = dict(os.environ)
        if self.rehearse:
            environment |= {"SAGELLM_CUDA_DEVICE": "cpu", "TRITON_INTERPRET": "1"}
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"\n===== {name}\n".encode())
            log.flush()
            return subprocess.Popen(argv, stdout=log, stderr=log, env=environment, start_new_session=True)


def main() -> int:
    """Run the chosen sections."""
    names = [name for stage in STAGES for name in stage]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(names), help="ops and kit stand for all of theirs")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a real model, for quality and serve")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/cuda-bench")))
    parser.add_argument("--budget", type=float, default=470.0, help="seconds of all sections together")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at a tiny size")
    args = parser.parse_args()
    groups = {group: [name for name in names if name.startswith(f"{group}-")] for group in ("ops", "kit")}
    chosen = [name for given in args.sections.split(",") for name in groups.get(given, [given])]
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: choose among {', '.join(names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.rehearse, [path.resolve() for path in args.model], args.budget)
    for stage in STAGES:
        sections = {name: limit for name, limit in stage.items() if name in chosen}
        if not sections:
            continue
        before, began = len(run.rows()), time.monotonic()
        if run.left() < 5:
            for name in sections:
                run.add(name, work=name, value=f"not run: {run.budget:.0f} s were up", ok=False)
        elif "probe" in sections:
            if missing := probe(run):
                write_tables(run)
                print(
                    f"missing: {', '.join(missing)}: see benchmarks/cuda/go.sh and {run.out}/table.md", file=sys.stderr
                )
                return 2
        else:
            run.stage(sections)
        run.seconds |= dict.fromkeys(sections, time.monotonic() - began)
        write_tables(run)
        print(f"--- {', '.join(sections)}: {time.monotonic() - began:.1f} s, {run.left():.0f} s left", flush=True)
        for row in run.rows()[before:]:
            print(f"    {judged(row) or '-':3} {row['work']}: {row['value']}", flush=True)
    return 0 if all(judged(row) != "no" for row in run.rows()) else 1


def probe(run: Run) -> list[str]:
    """Rows about the machine; return the packages that are missing. Nothing here can fail on a bare machine."""
    run.add("probe", work="date and machine", value=f"{time.strftime('%Y-%m-%d')}, {platform.platform()}")
    run.add("probe", work="processors", value=f"{os.cpu_count()}, {_said('free', '-g').splitlines()[1:2]}")
    query = (
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.free,clocks.sm,clocks.mem",
        "--format=csv,noheader",
    )
    run.add("probe", work="GPU, driver, memory, clocks", value=_said(*query))
    run.add("probe", work="nvcc, gcc", value=f"{_said('nvcc', '--version')[-60:]}; {_said('gcc', '--version')[:60]}")
    code = (
        "import sys, torch, triton; print('Python', sys.version.split()[0], 'torch', torch.__version__, 'CUDA', "
        "torch.version.cuda, 'triton', triton.__version__, 'sees a GPU' if torch.cuda.is_available() else 'sees no GPU', "
        "torch.cuda.get_device_properties(0) if torch.cuda.is_available() else '')"
    )
    versions = _said(sys.executable, "-c", code)
    run.add("probe", work="versions", value=versions)
    run.add("probe", work="room on disk", value=f"{shutil.disk_usage(run.out).free >> 30} GiB")
    missing = [name for name in NEEDED if find_spec(name) is None]
    missing += [] if run.rehearse or "sees a GPU" in versions else ["a GPU that torch sees"]
    run.add("probe", work="missing", value=", ".join(missing) or "none", ok=not missing)
    return missing


def _said(*argv: str) -> str:
    """What a command says, or why it says nothing."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{argv[0]}: {type(error).__name__}"
    return (
        (done.stdout.strip() or done.stderr.strip()[-300:])
        if done.returncode == 0
        else f"{argv[0]}: {done.stderr.strip()[-300:]}"
    )


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


def with_ratio(rows: list[Row]) -> list[Row]:
    """The rows, and how much faster the mix ran here than by transformers, if both did."""
    rates = {str(row["section"]): float(str(row["tokens_per_s"])) for row in rows if "tokens_per_s" in row}
    if not {"mix", "peer"} <= rates.keys():
        return rows
    value = f"{rates['mix']:,.0f} against {rates['peer']:,.0f} tokens/s"
    ratio = {"section": "peer", "work": "mix against transformers", "value": value, "goal_ratio": 3.0}
    return [*rows, ratio | {"ratio": rates["mix"] / rates["peer"]}]


def write_tables(run: Run) -> None:
    """Write what there is, for people and for programs."""
    rows = with_ratio(run.rows())
    result = {"seconds": run.seconds, "rows": rows}
    (run.out / "table.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (run.out / "table.md").write_text(render(rows), encoding="utf-8")


def render(rows: list[Row]) -> str:
    """The table for docs/cuda.md; operations that are right are counted, not listed."""
    right = [row for row in rows if str(row["section"]).startswith("ops") and judged(row) == "yes"]
    lines = ["| work | measured | against the limit | goal | reached |", "|---|---|---|---|---|"]
    if right:
        lines.append(f"| operations within their tolerance | {len(right)} |  |  | yes |")
    for row in rows:
        if row in right:
            continue
        share = next((f"{row[k]:.0f} %" for k in ("of_limit_percent", "hidden_percent") if k in row), "")
        share = f"{row['ratio']:.2f}×" if "ratio" in row else share
        goal = f"{row['goal_percent']:.0f} %" if "goal_percent" in row else row.get("goal", "")
        goal = f"{row['goal_ratio']:g}×" if "goal_ratio" in row else goal
        value = str(row["value"]).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row['work']} | {value} | {share} | {goal} | {judged(row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
