"""The relay that tells whose numbers are right: what it notes is what crossed it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sagellm import UnifiedInferenceClient


@pytest.fixture
def wire_tap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("wire_tap")


def test_the_relay_changes_nothing_and_notes_every_piece(wire_tap: ModuleType, mock_server: Any) -> None:
    """Answers through it are those of the server, over one connection too, and each completion is noted with its pieces and tokens."""
    options = {"model": "mock", "max_tokens": 12, "temperature": 0, "stream": True}
    with UnifiedInferenceClient(mock_server.base_url) as direct:
        want = [d.text for d in direct.generate("Say something.", **options)]
    with wire_tap.tap(mock_server.root_url) as (url, seen), UnifiedInferenceClient(f"{url}/v1") as client:
        assert "mock" in client.models()
        for _ in range(3):
            with client.generate("Say something.", stream_options={"include_usage": True}, **options) as deltas:
                assert "".join(d.text for d in deltas) == "".join(want)
    assert [e.output_tokens for e in seen] == [12, 12, 12]
    for e in seen:
        times = [e.arrived, *e.pieces, e.ended]
        assert times == sorted(times)
        assert len(e.pieces) == sum(map(bool, want))
        assert b"Say something." in e.body


def test_numbers_follow_from_what_was_noted(wire_tap: ModuleType) -> None:
    """Two at a time, the third begins a second after the first ended, while the second still decodes."""
    exchange = wire_tap.Exchange
    seen = [
        exchange(0.0, b"", [1.0, 2.0, 3.0], 3.0, 10, 3),
        exchange(0.0, b"", [2.0, 5.0, 8.0], 8.0, 10, 3),
        exchange(4.0, b"", [5.0, 6.0, 7.0], 7.0, 10, 3),
    ]
    got = wire_tap.numbers(seen, 2)
    assert got["ttft_ms"] == pytest.approx(1000 * (1 + 2 + 1) / 3)
    assert got["tpot_ms"] == pytest.approx(1000 * (1 + 3 + 1) / 3)
    assert got["output_tokens_per_s"] == pytest.approx(9 / 8)
    assert got["in_flight"] == pytest.approx((3 + 8 + 3) / 8)
    assert got["prefills_met"] == pytest.approx(2 / 3)
    assert got["think_ms"] == pytest.approx(1000)
