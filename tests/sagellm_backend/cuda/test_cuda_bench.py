"""The script for the GPU machine, as far as it can be run without one: a call there is too dear to fail on a slip."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "cuda"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(FOLDER) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_table_judges_what_has_a_goal(load: object) -> None:
    """Shares, ratios and checks are compared with their goals; a row without one is only shown; right operations are counted."""
    run: ModuleType = load("run")  # type: ignore[operator]
    rows = [
        {"section": "s", "work": "a", "value": "1 ms", "of_limit_percent": 86.0, "goal_percent": 85.0},
        {"section": "s", "work": "b", "value": "1 ms", "hidden_percent": 90.0, "goal_percent": 95.0},
        {"section": "s", "work": "d", "value": "1 | 2", "ok": False},
        {"section": "s", "work": "e", "value": "3 TB/s"},
        {"section": "ops-a", "work": "f", "value": "1e-3", "ok": True},
        {"section": "ops-a", "work": "g", "value": "0.3", "ok": False},
        {"section": "mix", "work": "h", "value": "7", "tokens_per_s": 70.0},
        {"section": "peer", "work": "i", "value": "2", "tokens_per_s": 20.0},
    ]
    assert [run.judged(row) for row in rows] == ["yes", "no", "no", "", "yes", "no", "", ""]
    table = run.render(run.with_ratio(rows))
    assert "| a | 1 ms | 86 % | 85 % | yes |" in table
    assert "| d | 1 \\| 2 |  |  | no |" in table
    assert "| operations within their tolerance | 1 |  |  | yes |" in table
    assert "| g | 0.3 |  |  | no |" in table
    assert "| f |" not in table
    assert "| mix against transformers | 70 against 20 tokens/s | 3.50× | 3× | yes |" in table


@pytest.fixture
def stubborn(load: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The run with sections that end in every way there is, in the place of the real ones."""
    run: ModuleType = load("run")  # type: ignore[operator]
    script = tmp_path / "section.py"
    script.write_text(SECTION)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    return run


SECTION = """
import json, os, sys, time
name, rows = sys.argv[1], sys.argv[3]
with open(rows, "a") as out:
    print(json.dumps({"section": name, "work": name, "value": sys.argv[5], "ok": True}), file=out, flush=True)
    if name == "limits":
        print(json.dumps({"section": name, "work": "x", "value": "y", "limits": {"copy": 3.0}}), file=out, flush=True)
    if name == "ops":
        time.sleep(600)
if name == "decode":
    os.kill(os.getpid(), 11)
"""


def test_a_section_that_hangs_or_dies_costs_only_itself(stubborn: ModuleType, tmp_path: Path) -> None:
    """What a section wrote before it was cut or died stays, and the ones after it have their turn, with the limits that were found."""
    run = stubborn.Run(tmp_path / "out", False, [], budget=30.0)
    run.out.mkdir()
    for stage in ({"limits": 20.0}, {"ops": 1.5, "quality": 20.0}, {"decode": 20.0}, {"mix": 20.0}):
        run.stage(stage)
    stubborn.write_tables(run)
    values = {(row["section"], row["value"]) for row in run.rows()}
    assert ("ops", "cut after 2 s") in values
    assert {("ops", '{"copy": 3.0}'), ("quality", '{"copy": 3.0}'), ("mix", '{"copy": 3.0}')} <= values
    assert ("decode", '{"copy": 3.0}') in values
    assert any(section == "decode" and "ended with -11" in str(value) for section, value in values)
    assert "cut after" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.cuda
def test_sizes_and_work_of_the_real_shapes(load: object) -> None:
    """Bytes and operations, the yardsticks of the table, are those of models of that name."""
    pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
    pytest.importorskip("triton", reason="triton is not installed: make test-cuda")
    shapes: ModuleType = load("shapes")  # type: ignore[operator]
    assert shapes.read_bytes(shapes.LLAMA_8B, 0, 0) == pytest.approx(2 * 7.50e9, rel=0.01)
    assert shapes.read_bytes(shapes.QWEN3_06B, 0, 0) == pytest.approx(2 * 0.596e9, rel=0.01)
    assert (
        shapes.read_bytes(shapes.LLAMA_8B, 256, 1024) - shapes.read_bytes(shapes.LLAMA_8B, 0, 0) == 256 * 1024 * 131072
    )
    assert shapes.prefill_flops(shapes.LLAMA_8B, 8192) == pytest.approx(2 * 6.98e9 * 8192 + 17.6e12, rel=0.01)


@pytest.mark.cuda
def test_chained_decode_and_the_written_model_run(
    load: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights decode step after step without waiting, and the model file of the start-up row loads and answers."""
    pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
    pytest.importorskip("triton", reason="triton is not installed: make test-cuda")
    from sagellm_backend.base import LoadOptions
    from sagellm_backend.cuda.settings import CudaSettings

    serve, speed, shapes = (load(name) for name in ("serve", "speed", "shapes"))  # type: ignore[operator]
    tiny = shapes.TINY.small
    runner = shapes.random_runner(tiny, LoadOptions(n_blocks=16, max_logit_rows=64), CudaSettings(device="cpu"))
    assert speed.decode_seconds(runner, 2, 20, 8) > 0
    monkeypatch.setenv("SAGELLM_CUDA_DEVICE", "cpu")
    serve.write_qwen3(tmp_path, tiny)
    code = serve._FIRST_TOKEN.replace("print(", "out.append(")
    out: list[object] = []
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
    exec(code.replace(", flush=True", ""), {"out": out})
    assert isinstance(out[0], list)
    assert 0 <= out[0][0] < 500
    assert "first token" in serve._stages(str(out[1]))


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_line(tmp_path: Path) -> None:
    """Without a GPU, at a tiny size, every section but those that need a model file gives its rows, and none fails."""
    pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
    pytest.importorskip("triton", reason="triton is not installed: make test-cuda")
    argv = [sys.executable, str(FOLDER / "run.py"), "--rehearse", "--out", str(tmp_path), "--budget", "850"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, env=environment, check=False, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    log = (tmp_path / "log.txt").read_text()
    assert not [row for row in rows if row.get("ok") is False], log[-4000:]
    assert {row["section"] for row in rows} >= {
        "probe",
        "ops-single",
        "kit-f32",
        "decode",
        "prefill",
        "mix",
        "tune",
        "start",
    }
