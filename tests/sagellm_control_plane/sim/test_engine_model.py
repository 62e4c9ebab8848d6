"""The engine model against a step-by-step twin, and its accounting."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_control_plane.sim.engine_model import EngineConstants, SimEngine, SimSequence

CONSTANTS = EngineConstants(
    prefill_tps=1000.0,
    step_s=0.01,
    per_sequence_s=0.002,
    per_token_s=1e-5,
    step_tokens=64,
    max_sequences=4,
    n_blocks=10_000,
    block_size=16,
    prefix_cache=False,
)


def step_by_step(work: list[tuple[float, int, int]], constants: EngineConstants) -> dict[int, tuple[float, float]]:
    """Every step one after the other, as plainly as possible: (first token, end) of each request."""
    waiting = sorted(range(len(work)), key=lambda i: (work[i][0], i))
    prefill: list[list[int]] = []
    decode: dict[int, int] = {}
    first: dict[int, float] = {}
    out: dict[int, tuple[float, float]] = {}
    now = 0.0
    while waiting or prefill or decode:
        while waiting and work[waiting[0]][0] <= now + 1e-12 and len(prefill) + len(decode) < constants.max_sequences:
            i = waiting.pop(0)
            prefill.append([i, work[i][1]])
        if not prefill and not decode:
            now = work[waiting[0]][0]
            continue
        budget = max(constants.step_tokens - len(decode), 1)
        spent, finished, order, computed = 0, [], list(prefill), set()
        if constants.oldest_share < 1.0 and len(prefill) > 1:
            order.sort(key=lambda entry: entry[1])
            if order[0] is not prefill[0]:
                spent = min(max(int(budget * constants.oldest_share), 1), prefill[0][1])
                prefill[0][1] -= spent
                computed.add(prefill[0][0])
                if prefill[0][1] == 0:
                    finished.append(prefill[0][0])
        for entry in order:
            take = min(entry[1], budget - spent)
            entry[1] -= take
            spent += take
            if take:
                computed.add(entry[0])
            if entry[1] == 0 and take:
                finished.append(entry[0])
        context = sum(work[i][1] + done for i, done in decode.items())
        now += (
            constants.step_s
            + constants.per_sequence_s * (len(decode) + len(computed))
            + constants.per_token_s * context
            + spent / constants.prefill_tps
        )
        decoding = list(decode)
        prefill = [entry for entry in prefill if entry[1] > 0]
        for i in decoding:
            decode[i] += 1
            if decode[i] == work[i][2]:
                del decode[i]
                out[i] = (first[i], now)
        for i in finished:
            first[i] = now
            if work[i][2] == 1:
                out[i] = (now, now)
            else:
                decode[i] = 1
    return out


def run_model(work: list[tuple[float, int, int]], constants: EngineConstants) -> dict[int, tuple[float, float]]:
    engine = SimEngine("e", constants)
    first: dict[int, float] = {}
    out: dict[int, tuple[float, float]] = {}

    def take(events):
        for kind, sequence, when in events:
            i = int(sequence.request_id)
            if kind == "first":
                first[i] = when
            else:
                out[i] = (first[i], when)

    for i in sorted(range(len(work)), key=lambda i: (work[i][0], i)):
        at, prompt, output = work[i]
        take(engine.advance(at))
        engine.submit(SimSequence(str(i), 1, prompt, output, ()), at)
    while engine.next_at != float("inf"):
        take(engine.advance(engine.next_at))
    assert engine._private == 0
    assert engine._context == 0
    assert not engine.sequences
    return out


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=12),
    st.sampled_from([1.0, 0.25]),
)
def test_runs_of_steps_equal_single_steps(rows, oldest_share):
    """Jumping over runs of equal steps gives the same times as taking every step, in both orders of prefill."""
    constants = msgspec.structs.replace(CONSTANTS, oldest_share=oldest_share)
    # Distinct arrivals off the step grid: simultaneous ones may join one step apart.
    work = [(at * 0.0371 + i * 1e-6, prompt, output) for i, (at, prompt, output) in enumerate(rows)]
    expected, got = step_by_step(work, constants), run_model(work, constants)
    assert got.keys() == expected.keys()
    for i, times in expected.items():
        assert got[i] == pytest.approx(times, rel=1e-9, abs=1e-9)


def test_a_cached_prefix_is_not_computed_again():
    """A second prompt with the same blocks prefills only its tail."""
    constants = EngineConstants(prefill_tps=1000.0, step_s=0.0, per_sequence_s=0.0, per_token_s=0.0, block_size=100)
    engine = SimEngine("e", constants)
    blocks = tuple(i.to_bytes(8, "big") for i in range(9))
    times = []
    for name, start in (("a", 0.0), ("b", 10.0)):
        engine.submit(SimSequence(name, 1, 950, 1, blocks), start)
        ((_first, sequence, when), _finish) = engine.advance(start + 5.0)
        times.append((round(when - start, 6), sequence.cached))
    assert times == [(0.95, 0), (0.05, 900)]


def test_memory_pressure_preempts_the_youngest_and_loses_nothing():
    """When decoding sequences outgrow the KV blocks, the youngest start over and still finish with all their tokens."""
    constants = EngineConstants(n_blocks=20, block_size=16, prefix_cache=False, step_tokens=64)
    engine = SimEngine("e", constants)
    for i in range(6):
        engine.submit(SimSequence(str(i), 1, 32, 100, ()), 0.0)
    done = []
    while engine.next_at != float("inf"):
        done += [s for kind, s, _when in engine.advance(engine.next_at) if kind == "finish"]
    assert engine.preemptions > 0
    assert sorted(s.request_id for s in done) == list("012345")
    assert (engine._private, engine._context) == (0, 0)


def test_an_abort_frees_everything_at_once():
    """Aborting waiting, prefilling and decoding sequences leaves no trace."""
    engine = SimEngine("e", CONSTANTS)
    for i in range(8):
        engine.submit(SimSequence(str(i), 1, 100, 50, ()), 0.0)
    engine.advance(1.0)
    assert {s.state for s in engine.sequences.values()} == {"waiting", "decode", "prefill"} or engine.waiting
    for i in range(8):
        engine.abort(str(i), 1, 1.0)
    engine.advance(100.0)
    assert (engine._private, engine._context, engine._decoding, engine.waiting) == (0, 0, 0, 0)
