"""The overlapped loop against the plain one, on a runner that keeps every step back until it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_backend.base import LoadOptions, StepBatch, StepResult
from sagellm_backend.blas import set_blas_threads
from sagellm_backend.conformance_specs import SPECS, random_weights
from sagellm_backend.overlap import LaunchRunner
from sagellm_backend.reference import ReferenceBackend, ReferenceRunner
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.overlap import OverlapEngine
from sagellm_core.testing import collect
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams

SPEC = SPECS["llama"]
WEIGHTS = random_weights(SPEC)
SETTINGS = EngineSettings(
    engine_id="tiny", model="tiny", n_ctx=128, max_running=4, max_rows=48, max_logit_rows=64, backend="reference"
)


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread() -> None:
    set_blas_threads(1)


class KeptStep:
    """A step that runs when its result, or a later step's, is asked for."""

    def __init__(self, runner: ReferenceRunner, batch: StepBatch, before: KeptStep | None) -> None:
        self.runner, self.batch, self.before = runner, batch, before
        self.after: KeptStep | None = None
        self.done: StepResult | None = None

    def result(self) -> StepResult:
        if self.done is None:
            batch = self.batch
            if (batch.token_ids < 0).any():
                assert self.after is not None, "a row follows nothing"
                drawn = np.maximum(self.after.result().token_ids, 0)
                tokens = [t if t >= 0 else drawn[-1 - t] for t in batch.token_ids.tolist()]
                batch = replace(batch, token_ids=np.array(tokens, np.int32))
            elif self.before is not None:
                self.before.result()
            self.done = self.runner.step(batch)
        return self.done


class KeepingRunner:
    """The reference as a device that works in order but as late as it can."""

    def __init__(self, runner: ReferenceRunner) -> None:
        self._runner = runner
        self._last: KeptStep | None = None
        self.fail_at = -1
        self.launches = 0

    def __getattr__(self, name: str) -> object:
        if self.__dict__.get("_last") is not None and name in ("kv", "step"):
            self._last.result()
        return getattr(self._runner, name)

    @property
    def kv(self) -> object:
        """Copies and exports come after the steps before them."""
        if self._last is not None and self._last.done is None:
            self._last.result()
        return self._runner.kv

    def launch(self, batch: StepBatch, after: KeptStep | None = None) -> KeptStep:
        self.launches += 1
        if self.launches == self.fail_at:
            raise RuntimeError("the device is gone")
        step = KeptStep(self._runner, batch, self._last)
        step.after = after
        self._last = step
        return step


@dataclass
class Pair:
    """Two engines over equal models."""

    plain: Engine
    overlapped: OverlapEngine
    runner: KeepingRunner


def make_pair(n_blocks: int = 64) -> Pair:
    options = LoadOptions(n_blocks=n_blocks, max_rows=48, max_logit_rows=64)
    runner = KeepingRunner(ReferenceBackend().load(SPEC, WEIGHTS, options))
    assert isinstance(runner, LaunchRunner)
    plain = Engine(ReferenceBackend().load(SPEC, WEIGHTS, options), SETTINGS)
    return Pair(plain, OverlapEngine(runner, SETTINGS), runner)  # type: ignore[arg-type]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = make_pair()
    yield made
    made.plain.close()
    made.overlapped.close()


def request(name: str, length: int, seed: int, **sampling: object) -> EngineRequest:
    rng = np.random.default_rng(seed)
    params = {"max_tokens": 12, "seed": seed, **sampling}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=tuple(rng.integers(0, SPEC.vocab_size, length).tolist()),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        eos_token_ids=(7, 11, 13),
    )


def texts(engine: Engine, requests: list[EngineRequest]) -> dict[str, tuple[list[int], str | None]]:
    return {name: (got.token_ids, got.finish_reason) for name, got in collect(engine, requests).items()}


def test_the_loop_works_ahead(pair: Pair) -> None:
    """Plain decoding of a few sequences launches nearly every step before the one before it is known."""
    requests = [request(str(i), 5 + i, i, ignore_eos=True, max_tokens=30) for i in range(3)]
    assert texts(pair.overlapped, requests) == texts(pair.plain, requests)
    assert pair.overlapped.followed >= 25
    pair.overlapped.check_integrity()


SAMPLING = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5])},
    optional={
        "max_tokens": st.integers(1, 14),
        "min_tokens": st.just(1),
        "repetition_penalty": st.just(1.3),
        "stop_token_ids": st.just(tuple(range(0, 320, 9))),
        "logprobs": st.integers(0, 3),
        "top_p": st.just(0.8),
        "prompt_logprobs": st.just(1),
    },
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), SAMPLING), min_size=1, max_size=7), st.sampled_from([12, 20, 64]))
def test_tokens_are_the_plain_loops(shapes: list[tuple[int, dict[str, object]]], n_blocks: int) -> None:
    """Whatever the mix of lengths, parameters, stops, pre-emptions and waiting, both loops give the same tokens and endings."""
    requests = [request(str(i), length, i, **sampling) for i, (length, sampling) in enumerate(shapes)]
    pair = make_pair(n_blocks)
    assert texts(pair.overlapped, requests) == texts(pair.plain, requests)
    pair.overlapped.check_integrity()


def test_arrivals_and_aborts_while_a_step_is_on_its_way(pair: Pair) -> None:
    """A sequence that comes, and one that is aborted, in the middle of a flight leave the others' tokens as they are."""
    want = texts(pair.plain, [request("a", 9, 1, max_tokens=20, ignore_eos=True), request("c", 20, 3)])
    engine, tokens = pair.overlapped, dict[str, list[int]]()
    engine.add(request("a", 9, 1, max_tokens=20, ignore_eos=True))
    engine.add(request("b", 9, 2, max_tokens=50, ignore_eos=True))
    for number in range(200):
        if number == 5:
            assert engine.abort("b")
        if number == 6:
            engine.add(request("c", 20, 3))
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        if number > 6 and not engine.has_work:
            break
    assert not engine.has_work
    assert {name: tokens[name] for name in "ac"} == {name: ids for name, (ids, _) in want.items()}
    engine.check_integrity()


def test_a_failed_launch_fails_its_sequences_only(pair: Pair) -> None:
    """When the device refuses a step, its sequences end with an error and the next request is served."""
    pair.runner.fail_at = 4
    got = collect(pair.overlapped, [request("a", 5, 1, ignore_eos=True)])["a"]
    assert got.finish_reason == "error"
    assert texts(pair.overlapped, [request("b", 5, 2)]) == texts(pair.plain, [request("b", 5, 2)])
    pair.overlapped.check_integrity()
