"""`sage-llm demo`: the file, the numbers, the verdict, the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm.demo import METRICS, THRESHOLDS, judge


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_mock_writes_measured_numbers_and_is_judged(tmp_path: Path) -> None:
    """Year 1 on the mock writes every metric of the contract, evicts, and passes exactly when no threshold is missed."""
    target = tmp_path / "metrics.json"
    done = subprocess.run(
        [sys.executable, "-m", "sagellm", "demo", "--workload", "year1", "--mock", "-o", str(target)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    result = json.loads(target.read_text())
    assert set(METRICS) <= set(result)
    assert result["evict_count"] > 0
    assert result["kv_used_tokens"] > 2048
    assert result["segments"]["stress"]["output_tokens"] == 12 * 256
    assert result["segments"]["long"]["prompt_tokens"] == 2 * 2048
    assert result["ttft_ms"] > 4  # the simulated device takes 4 ms a step and 60 µs a row
    assert result["passed"] == all(result["verdicts"].values())
    assert done.returncode == (0 if result["passed"] else 1), done.stderr


@pytest.mark.parametrize("year", sorted(THRESHOLDS))
def test_each_threshold_is_judged_alone(year: str) -> None:
    """At the threshold a metric passes; beyond it, that metric alone is missed; a number that was not measured is missed."""
    at = dict.fromkeys(METRICS, 0.0) | THRESHOLDS[year]
    assert all(judge(year, at).values())
    for name, bound in THRESHOLDS[year].items():
        worse = bound * (0.9 if name.endswith(("tps", "rate")) and name != "error_rate" else 1.1)
        verdicts = judge(year, at | {name: worse})
        assert [metric for metric, kept in verdicts.items() if not kept] == [name]
        if name != "error_rate":
            assert not judge(year, at | {name: 0.0})[name]


def test_an_unknown_workload_is_refused() -> None:
    """A year that is not there is an error that lists the years."""
    done = subprocess.run(
        [sys.executable, "-m", "sagellm", "demo", "-w", "year9", "--mock"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "year1, year2, year3" in done.stderr
