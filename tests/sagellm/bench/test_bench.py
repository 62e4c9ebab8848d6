"""The load generator: its arithmetic, its workloads, and what it measures on a server of known speed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.bench.compare import compare, differences, load_run
from sagellm.bench.report import SLO, percentile, summarize
from sagellm.bench.runner import Record
from sagellm.bench.workload import Arrival, closed_loop, open_loop, prompt_of, trace
from sagellm_protocol.errors import InvalidArgumentError


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    """Percentiles interpolate as numpy's default does."""
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-9)


def record(index: int, sent: float, tokens: list[float], **fields: Any) -> Record:
    return Record(index, None, sent, tokens, tokens[-1] if tokens else sent, 10, len(tokens), **fields)


def test_the_numbers_of_a_known_run() -> None:
    """TTFT, TPOT, ITL, E2E, throughput, errors and goodput are what they are by hand."""
    records = [
        record(0, 0.0, [0.1, 0.2, 0.3]),
        record(1, 0.0, [1.0, 1.1, 1.2, 1.5]),
        record(2, 0.5, [], error="unavailable: no engine"),
    ]
    numbers = summarize(records, SLO(ttft_s=0.5, tpot_s=0.2))
    assert numbers["ttft_ms"]["mean"] == pytest.approx(550)
    assert numbers["tpot_ms"]["max"] == pytest.approx(500 / 3, abs=0.001)
    assert numbers["itl_ms"]["max"] == pytest.approx(300)
    assert numbers["e2e_ms"]["max"] == pytest.approx(1500)
    assert numbers["output_tokens_per_s"] == pytest.approx(7 / 1.5, abs=0.001)
    assert numbers["errors"] == {"unavailable": 1}
    assert numbers["goodput"] == pytest.approx(1 / 3, abs=1e-6)


def test_a_run_without_any_answer_has_numbers() -> None:
    """When every request failed, the summary says so instead of breaking."""
    numbers = summarize([record(0, 0.0, [], error="internal: x")], SLO())
    assert numbers["error_rate"] == 1.0
    assert numbers["ttft_ms"] == {}


def test_poisson_arrivals_have_the_rate_and_the_seed() -> None:
    """Gaps are exponential with the wanted mean, and the same seed gives the same times."""
    load = open_loop(requests=4000, rate=50, prompt_tokens=8, output_tokens=8, seed=3)
    times = [a.at_s for a in load.arrivals]
    gaps = np.diff(np.array(times, dtype=float))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.08)
    assert load == open_loop(requests=4000, rate=50, prompt_tokens=8, output_tokens=8, seed=3)
    with pytest.raises(InvalidArgumentError):
        open_loop(requests=1, rate=0, prompt_tokens=1, output_tokens=1)


def test_traces_of_both_kinds_are_read(tmp_path: Path) -> None:
    """Mooncake lines and Azure rows become arrivals, sped up and cut as asked; anything else is refused."""
    mooncake = tmp_path / "m.jsonl"
    rows = [{"timestamp": t, "input_length": 600, "output_length": 9, "hash_ids": [7, 8]} for t in (1000, 3000)]
    mooncake.write_text("\n".join(map(json.dumps, rows)))
    load = trace(mooncake, requests=10, speedup=2, longest=512)
    assert load.arrivals == (Arrival(0.0, 512, 9, 7, 512), Arrival(1.0, 512, 9, 7, 512))
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,12,8\n"
    )
    assert [a.prompt_tokens for a in trace(azure, requests=2).arrivals] == [4808, 12]
    with pytest.raises(InvalidArgumentError, match="line 2 is not of the Azure format"):
        bad = tmp_path / "b.csv"
        bad.write_text("x,y\n1,2\n")
        trace(bad, requests=1)


def test_prompts_share_what_they_should_and_nothing_else() -> None:
    """Two prompts have the shared words in common and then differ; the same index gives the same prompt."""
    arrival = Arrival(None, 40, 1, 0, 16)
    one, two = prompt_of(arrival, 0, 0).split(), prompt_of(arrival, 1, 0).split()
    assert len(one) == 40
    assert one[:16] == two[:16]
    assert one[16:] != two[16:]
    assert prompt_of(arrival, 0, 0).split() == one
    assert len(prompt_of(arrival, 0, 0, 0.5).split()) == 20


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sagellm", "bench", *args], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.slow
def test_a_server_of_known_speed_is_measured_right(start_server: Any, tmp_path: Path) -> None:
    """Against a mock that takes 20 ms a token, TPOT is 20 ms within the scheduling noise, and all files are written."""
    # 4.15 ms a step with one sequence, times 5.
    server = start_server("--mock", "--mock-scale", "5")
    done = bench(
        "latency",
        "--url",
        server.root_url,
        "--requests",
        "4",
        "--output-tokens",
        "24",
        "--warmup",
        "1",
        "-o",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    run = load_run(tmp_path)
    assert run["summary"]["failed"] == 0
    assert run["summary"]["output_tokens"] == 4 * 24
    assert 20.0 <= run["summary"]["tpot_ms"]["p50"] <= 30.0
    with (tmp_path / "requests.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    ET.parse(tmp_path / "plot.svg")


def test_open_loop_and_comparison_by_command(tmp_path: Path) -> None:
    """Poisson against an embedded mock runs, and comparing a run with itself says that all is the same."""
    done = bench(
        "serve", "--mock", "--mock-scale", "0", "--rate", "50", "--requests", "10", "--json", "-o", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["failed"] == 0
    assert bench("compare", str(tmp_path), str(tmp_path)).stdout.count("same") >= 10
    run = load_run(tmp_path)
    assert differences(run, {**run, "model": "other"}) == ["model: mock and other"]
    worse = json.loads(json.dumps(run))
    worse["summary"]["ttft_ms"]["p50"] *= 2
    assert ("ttft_ms.p50", "worse") in [(name, verdict) for name, *_, verdict in compare(run, worse)]
    with pytest.raises(InvalidArgumentError):
        load_run(tmp_path / "requests.csv")


def test_a_server_that_is_not_there_fails_with_status_one() -> None:
    """Without any answer the command ends with 1 and the reason."""
    done = bench("latency", "mock", "--url", "http://127.0.0.1:9/v1", "--requests", "2", "--warmup", "0")
    assert done.returncode == 1
    assert "unavailable" in done.stdout


def test_contradictions_are_refused() -> None:
    """Exactly one of rate, trace and concurrency, and no mock behind a URL."""
    assert "choose one" in bench("serve", "--mock").stderr
    assert "--mock" in bench("latency", "--mock", "--url", "http://127.0.0.1:9/v1").stderr


def test_closed_loop_is_what_it_says() -> None:
    """A closed loop has no due times and a bound."""
    load = closed_loop(requests=3, concurrency=2, prompt_tokens=4, output_tokens=5)
    assert load.concurrency == 2
    assert all(a.at_s is None for a in load.arrivals)
