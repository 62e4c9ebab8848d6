"""The engine model against the engine: the real scheduler, KV cache and step loop under a clock that only their steps move."""

from __future__ import annotations

import random

import pytest

from sagellm_backend.mock import Latency
from sagellm_control_plane.sim.engine_model import EngineConstants, SimEngine, SimSequence
from sagellm_core.testing import mock_engine
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams

LATENCY = Latency(base=0.025, prefill_row=0.0004, sequence=0.001)
CONSTANTS = EngineConstants(
    prefill_tps=2500.0,
    step_s=0.025,
    per_sequence_s=0.001,
    per_token_s=0.0,
    step_tokens=256,
    oldest_share=0.25,
    max_sequences=16,
    block_size=16,
    n_blocks=4096,
    prefix_cache=False,
)
Times = dict[str, tuple[float, float]]
Work = list[tuple[float, int, int]]


class Clock:
    """Seconds that pass when somebody says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def by_engine(work: Work) -> Times:
    """Return the times of the first token and of the last one of each request, as the engine has them."""
    clock = Clock()
    engine = mock_engine(n_blocks=4096, n_ctx=4096, max_running=16, max_rows=256, clock=clock)
    run = engine._runner.step

    def step(batch):
        clock.now += LATENCY.of(batch.lengths)
        return run(batch)

    engine._runner.step = step
    first: dict[str, float] = {}
    out: Times = {}
    coming = [*enumerate(work)]
    while coming or engine.has_work:
        if not engine.has_work:
            clock.now = max(clock.now, coming[0][1][0])
        while coming and coming[0][1][0] <= clock.now:
            number, (_at, prompt, output) = coming.pop(0)
            ids = [number >> 8, number & 255, *([7] * prompt)][:prompt]
            sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=output, ignore_eos=True)
            engine.add(EngineRequest(request_id=str(number), prompt_token_ids=tuple(ids), sampling=sampling))
        for delta in engine.step():
            if delta.token_ids:
                first.setdefault(delta.request_id, clock.now)
            if delta.finish_reason is not None:
                out[delta.request_id] = (first[delta.request_id], clock.now)
    return out


def by_model(work: Work) -> Times:
    """The same as the model has them."""
    engine = SimEngine("e", CONSTANTS)
    out: Times = {}

    def take(events) -> None:
        for kind, sequence, when in events:
            if kind == "finish":
                out[sequence.request_id] = (sequence.first_at, when)

    for number, (at, prompt, output) in enumerate(work):
        take(engine.advance(at))
        engine.submit(SimSequence(str(number), 1, prompt, output, ()), at)
    while engine.next_at != float("inf"):
        take(engine.advance(engine.next_at))
    return out


@pytest.mark.parametrize("rate", [1.0, 3.0, 6.0])
def test_the_model_keeps_the_engines_times(rate):
    """Below, at and beyond saturation, every first and last token comes when the engine has it, to a few rows of prefill."""
    rng = random.Random(4)
    at, work = 0.0, []
    for _ in range(150):
        at += rng.expovariate(rate)
        work.append((at, 2 + min(int(rng.expovariate(1 / 300)), 2000), 1 + int(rng.expovariate(1 / 40))))
    expected, got = by_engine(work), by_model(work)
    assert got.keys() == expected.keys()
    for name, times in expected.items():
        # A last chunk of a single row is free on the simulated device.
        assert got[name] == pytest.approx(times, abs=5 * LATENCY.prefill_row)
