"""The tables of `make bench`: whatever they claim follows from the rounds."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

CPU = Path(__file__).parents[2] / "benchmarks" / "cpu"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CPU))
    return importlib.import_module("report")


def rounds(**numbers: dict[str, list[float]]) -> list[dict[str, dict[str, float]]]:
    """Row -> contender -> one number a round, as a list of rounds."""
    count = max(len(values) for row in numbers.values() for values in row.values())
    out: list[dict[str, dict[str, float]]] = [{} for _ in range(count)]
    for row, contenders in numbers.items():
        for name, values in contenders.items():
            for k, value in enumerate(values):
                out[k].setdefault(name, {})[row] = value
    return out


def lines(report: ModuleType, numbers: list[dict[str, dict[str, float]]], **left_out: str) -> dict[str, list[str]]:
    """First cell -> the other cells of each line of the q4 part's table."""
    part = {"title": "t", "rounds": numbers, "left_out": left_out}
    text = report.table({"machine": "m", "threads": 2, "date": "d", "parts": {"q4": part}})
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells}


def test_ratios_are_taken_within_rounds(report):
    """A round in which everything is twice as slow changes no ratio; the best peer is that of each round."""
    seen = rounds(decode={"isagellm": [400, 200, 390], "llama.cpp": [200, 100, 100], "openvino": [100, 50, 195]})
    row = lines(report, seen)["decode, one stream, 128 tokens"]
    assert row == ["tok/s", "390", "100", "100", "2.00× (2.00–2.00)", "≥ 1.7× the best", "yes"]


def test_less_is_better_turns_the_ratio(report):
    """Half the milliseconds are two times ahead."""
    assert report.ratios(rounds(ttft16={"isagellm": [100], "llama.cpp": [200]}), "ttft16") == [2.0]


def test_a_goal_against_a_named_peer_needs_that_peer(report):
    """Ahead of the best is not ahead of the named peer: without it the goal is not measured, and a miss says by how much."""
    row = "16 streams, prompt 32"
    alone = lines(report, rounds(streams16={"isagellm": [1000], "llama.cpp": [500]}))[row]
    assert alone[-1] == "not measured; no (2.00×)"
    both = lines(report, rounds(streams16={"isagellm": [1600], "llama.cpp": [500], "openvino": [1000]}))[row]
    assert both[-2:] == ["≥ 1.6× OpenVINO GenAI; ≥ 2.5× llama.cpp", "yes; yes"]


def test_absolute_goals_and_limits(report):
    """A bound is on our own median; a share is of the limit of the same round."""
    seen = rounds(ready={"isagellm": [0.5, 0.61, 0.7]}, decode={"isagellm": [79, 158, 90]})
    for number, limit in zip(seen, (100, 200, 100), strict=True):
        number["isagellm"]["decode_limit"] = limit
    table = lines(report, seen)
    assert table["command to ready"][-2:] == ["≤ 0.6 s", "no"]
    assert table["decode, share of what the measured read bandwidth allows"][-2:] == ["≥ 80%", "no (79%)"]


def test_what_is_left_out_is_said(report):
    """A peer that could not run is named with its reason, and has no column."""
    part = {"title": "t", "rounds": rounds(decode={"isagellm": [1]}), "left_out": {"openvino": "it knows no gemma3"}}
    text = report.table({"machine": "m", "threads": 2, "date": "d", "parts": {"gemma3": part}})
    assert "OpenVINO GenAI (in process) is left out: it knows no gemma3" in text
    assert "| OpenVINO" not in text


def test_every_goal_belongs_to_a_row_that_is_measured(report):
    """No part has a goal for a row that it does not know, or against a peer that it does not run."""
    rows = importlib.import_module("rows")
    for part in rows.PARTS.values():
        assert set(part.rows) <= set(rows.ROWS)
        assert set(part.goals) <= set(rows.ROWS)
        for goals in part.goals.values():
            assert all(goal.peer in ("", *part.peers) for goal in goals)
