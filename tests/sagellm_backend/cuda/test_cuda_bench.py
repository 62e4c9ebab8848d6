"""The script for the GPU machine, as far as it can be run without one: a call there is too dear to fail on a slip."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
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
    """Shares, ratios and checks are compared with their goals; a row without one is only shown."""
    run: ModuleType = load("run")  # type: ignore[operator]
    rows = [
        {"work": "a", "value": "1 ms", "of_limit_percent": 86.0, "goal_percent": 85.0},
        {"work": "b", "value": "1 ms", "hidden_percent": 90.0, "goal_percent": 95.0},
        {"work": "c", "value": "x", "ratio": 3.5, "goal_ratio": 3.0},
        {"work": "d", "value": "1 | 2", "ok": False},
        {"work": "e", "value": "3 TB/s"},
    ]
    assert [run.judged(row) for row in rows] == ["yes", "no", "yes", "no", ""]
    table = run.render({"date": "today", "machine": "m", "sections": {"s": {"rows": rows}}})
    assert "| a | 1 ms | 86 % | 85 % | yes |" in table
    assert "| c | x | 3.50× | 3× | yes |" in table
    assert "| d | 1 \\| 2 |  |  | no |" in table


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
    tiny = msgspec.structs.replace(
        shapes.QWEN3_06B, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=96, vocab_size=200,
        rope=msgspec.structs.replace(shapes.QWEN3_06B.rope, dim=32),
    )  # fmt: skip
    runner = shapes.random_runner(tiny, LoadOptions(n_blocks=16, max_logit_rows=64), CudaSettings(device="cpu"))
    assert speed.decode_seconds(runner, 2, 20, 8) > 0
    monkeypatch.setattr(serve, "QWEN3_06B", tiny)
    monkeypatch.setenv("SAGELLM_CUDA_DEVICE", "cpu")
    serve.write_qwen3(tmp_path)
    code = serve._FIRST_TOKEN.replace("print(", "out.append(")
    out: list[object] = []
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
    exec(code.replace(", flush=True", ""), {"out": out})
    assert isinstance(out[0], list)
    assert 0 <= out[0][0] < 200
