"""`sage-llm simulate` as a user meets it: the table, the files, and what it says about input that means nothing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from sagellm_control_plane.sim.command import main

LINE = '{"timestamp": %d, "input_length": 1024, "output_length": 20, "hash_ids": [1, %d]}\n'
CONSTANTS = {"prefill_tps": 8000.0, "step_tokens": 256, "oldest_share": 0.25}


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(LINE % (i * 100, i) for i in range(50)))
    return path


def test_a_run_gives_a_table_numbers_and_a_plot(trace, tmp_path, capsys):
    """Every policy at every speed-up is a cell of the table, a row of the JSON and a point of the plot."""
    constants = tmp_path / "engine.json"
    constants.write_text(json.dumps(CONSTANTS))
    files = [f"--json={tmp_path / 'out.json'}", f"--plot={tmp_path / 'out.svg'}", f"--constants={constants}"]
    assert main([f"--trace={trace}", "--policy=round_robin, adaptive", "--speedup=1,4", "--engines=2", *files]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["policy", "1x", "4x"]
    assert [line.split()[0] for line in table[1:]] == ["round_robin", "adaptive"]
    rows = json.loads((tmp_path / "out.json").read_bytes())
    assert [(row["policy"], row["speed_up"]) for row in rows] == [
        ("round_robin", 1.0), ("round_robin", 4.0), ("adaptive", 1.0), ("adaptive", 4.0),
    ]  # fmt: skip
    assert all(row["requests"] == 50 and row["hit_rate"] > 0.3 for row in rows)
    lines = ET.parse(tmp_path / "out.svg").getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]


def test_faults_change_the_run_and_lose_nothing(trace, capsys):
    """A crash moves requests to the other engine: they wait longer, and none of them fails."""
    for faults, moved in (("", False), ("crash:e0@2=1,slow:e1@0=3", True)):
        assert main([f"--trace={trace}", "--policy=round_robin", "--engines=2", f"--faults={faults}"]) == 0
        told = capsys.readouterr().err
        assert "failed 0" in told
        assert ("goodput 1.000" not in told) == moved


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trace=nowhere.jsonl", "nowhere.jsonl: No such file"),
        ("--policy=best", "policy 'best' is unknown: routing strategies are"),
        ("--speedup=1,x", "speedup is '1,x': write numbers"),
        ("--speedup=0", "speedup is '0'"),
        ("--engines=0", "engines is 0: it must be a number above 0"),
        ("--ttft=0", "ttft is 0"),
        ("--faults=fire@1", "fault 'fire@1' is not understood: write kind"),
        ("--faults=crash:e9@1", "there is no 'e9', engines are e0 to e7"),
        ("--faults=lossy@0=2", "the value of 'lossy' is from 0 to 1"),
        ("--json=/nowhere/out.json", "there is no folder /nowhere"),
        ("--constants=nowhere.json", "nowhere.json: No such file"),
    ],
)
def test_what_means_nothing_is_named(trace, capsys, argument, message):
    """Input that cannot be simulated ends with status 1 and a line that names it."""
    assert main([f"--trace={trace}", argument]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", (LINE % (0, 0)).encode() + b'{"timestamp": 1}\n', "line 2 is not of the Mooncake format"),
        ("t.jsonl", b'{"timestamp":1,"input_length":-5,"output_length":3,"hash_ids":[]}', "`int` >= 0"),
        ("t.jsonl", b"\xff\xfe\x00", "is not text"),
        ("t.jsonl", b"", "has no requests"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,10,-1\n", "line 2 is not of the Azure"),
        ("t.txt", b"", "the suffix '.txt'"),
    ],
)  # fmt: skip
def test_a_broken_trace_is_named_by_its_line(tmp_path, capsys, name, content, message):
    """A trace that cannot be read ends with status 1 and the line at fault."""
    path = tmp_path / name
    path.write_bytes(content)
    assert main([f"--trace={path}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step_tokens": 0}', "step_tokens is 0: it must be above 0"),
        ('{"step_tokes": 1}', "unknown field `step_tokes`"),
    ],
)
def test_constants_of_no_engine_are_named(trace, tmp_path, capsys, content, message):
    """A number that no engine has, and a name that is none, are refused."""
    path = tmp_path / "engine.json"
    path.write_text(content)
    assert main([f"--trace={trace}", f"--constants={path}"]) == 1
    assert message in capsys.readouterr().err
