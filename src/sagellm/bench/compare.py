"""Two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["compare", "differences", "load_run"]

_ROWS = (
    ("requests_per_s", "higher"),
    ("output_tokens_per_s", "higher"),
    ("goodput", "higher"),
    ("error_rate", "lower"),
    ("ttft_ms.p50", "lower"),
    ("ttft_ms.p99", "lower"),
    ("tpot_ms.p50", "lower"),
    ("tpot_ms.p99", "lower"),
    ("itl_ms.p50", "lower"),
    ("itl_ms.p99", "lower"),
    ("e2e_ms.p50", "lower"),
    ("e2e_ms.p99", "lower"),
)


def load_run(path: Path) -> dict[str, Any]:
    """Return a run from its folder or its ``run.json``.

    Raises:
        InvalidArgumentError: it is not the file of a run.
    """
    file = path / "run.json" if path.is_dir() else path
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        run["summary"]["ttft_ms"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{path} holds no run of sage-llm bench ({type(error).__name__}): give the folder of its --output"
        ) from error
    return run


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, float, float, float | None, str]]:
    """Return (measure, a, b, b/a, verdict) rows; the verdict is ``better``, ``worse`` or ``same`` (within 2 %)."""
    rows = []
    for name, direction in _ROWS:
        one, two = _value(a["summary"], name), _value(b["summary"], name)
        if one is None or two is None:
            continue
        ratio = two / one if one else None
        rows.append((name, one, two, ratio, _verdict(one, two, direction)))
    return rows


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return in what the two runs were not the same experiment."""
    names = ("kind", "model", "workload", "prompt_tokens", "output_tokens", "requests", "seed")
    return [f"{n}: {a.get(n)} and {b.get(n)}" for n in names if a.get(n) != b.get(n)]


def _value(summary: dict[str, Any], name: str) -> float | None:
    value: Any = summary
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if value is not None else None


def _verdict(one: float, two: float, direction: str) -> str:
    if abs(two - one) <= 0.02 * max(abs(one), abs(two)):
        return "same"
    return "better" if (two > one) == (direction == "higher") else "worse"
