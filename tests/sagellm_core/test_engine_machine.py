"""A state machine drives the whole engine over the simulated device, whose output depends on every cached token."""

import random
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sagellm_backend.adapter import Adapter
from sagellm_core import masks
from sagellm_core.grammar import LLGuidanceCompiler
from sagellm_core.speculation import NgramSpeculator
from sagellm_core.testing import Collected, collect, mock_engine, run_alone
from sagellm_core.text.bytes_model import VOCAB_SIZE, ByteChatModel
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.sampling import GrammarSpec, SamplingParams

N_CTX = 96
ADAPTERS = {
    name: Adapter(name, {"0.q": (np.full((1, 32), value, np.float32), np.ones((32, 1), np.float32))})
    for value, name in enumerate(("formal", "brief"))
}


class Grammars:
    """Grammars that are compiled once for all engines of these tests, so that none of them waits for one."""

    def __init__(self):
        self._compiler = LLGuidanceCompiler(lambda: ByteChatModel("m", 4096).tokenizer, VOCAB_SIZE)

    def compile(self, spec):
        constraint = self._compiler.compile(spec)
        while not constraint.ready():  # only the first time
            threading.Event().wait(0.001)
        return constraint

    def masks(self, asked):
        return self._compiler.masks(asked)

    def close(self):
        """The next engine uses them too."""

    def end(self):
        self._compiler.close()


GRAMMARS = Grammars()
SENTENCES = [
    None,
    None,
    GrammarSpec(kind="regex", source="(a[bc]|x y)*z?"),
    GrammarSpec(kind="choice", source='["abcabcabcabcd", "abc", "yes"]'),
]


@pytest.fixture(autouse=True, scope="module")
def masks_on_their_thread():
    """However little they take, masks are written beside the steps; the process that compiles grammars ends with the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_HAND_OVER_S", 0.0)
        yield
    GRAMMARS.end()


def request_of(name: str, prompt: bytes, **how) -> EngineRequest:
    sampling = {"temperature": 0.0, "seed": 7, "max_tokens": 8, **how.pop("sampling", {})}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**sampling),
        eos_token_ids=(257, 259),
        **how,
    )


class EngineMachine(RuleBasedStateMachine):
    """Adds, aborts, steps, expires and preempts on an engine whose cache is far too small."""

    @initialize(
        n_blocks=st.integers(7, 20),
        rows=st.integers(6, 40),
        caching=st.booleans(),
        spill=st.booleans(),
        guess=st.booleans(),
    )
    def start(self, n_blocks, rows, caching, spill, guess):
        self.now = 0.0
        self.dir = tempfile.TemporaryDirectory()
        self.engine = mock_engine(
            n_blocks=n_blocks,
            n_ctx=N_CTX,
            max_running=5,
            max_rows=rows,
            max_logit_rows=5 * 5 + 16,
            prefix_caching=caching,
            clock=lambda: self.now,
            grammars=GRAMMARS,
            speculator=NgramSpeculator(4, 3, 1) if guess else None,
            spill_dir=Path(self.dir.name) if spill else None,
            spill_blocks=6,
        )
        self.requests: dict[str, EngineRequest] = {}
        self.out: dict[str, Collected] = {}
        self.aborted: set[str] = set()
        self.engine.load_adapter(ADAPTERS["formal"])
        self.loaded = {"formal"}

    @rule(
        prompt=st.lists(st.sampled_from([b"ab", b"abcdefgh", b"xyz. " * 4]), min_size=1, max_size=4).map(b"".join),
        max_tokens=st.integers(1, 30),
        priority=st.integers(0, 4),
        temperature=st.sampled_from([0.0, 1.0, 1.5]),
        seed=st.integers(0, 3),
        salt=st.sampled_from(["", "tenant"]),
        deadline=st.sampled_from([None, None, 5.0]),
        scored=st.booleans(),
        copies=st.integers(1, 3),
        adapter=st.sampled_from([None, None, "formal", "brief"]),
        grammar=st.sampled_from(SENTENCES),
    )
    def add(self, prompt, max_tokens, priority, temperature, seed, salt, deadline, scored, copies, adapter, grammar):
        for _ in range(copies):
            name = f"r{len(self.requests)}"
            request = request_of(
                name,
                prompt[: N_CTX - max_tokens],
                sampling={
                    "temperature": temperature,
                    "seed": seed,
                    "max_tokens": max_tokens,
                    "logprobs": 1,
                    "prompt_logprobs": 0 if scored else None,
                    "grammar": grammar,
                },
                priority=priority,
                cache_salt=salt,
                deadline_s=deadline,
                adapter=adapter if adapter in self.loaded else None,
            )
            self.requests[name], self.out[name] = request, Collected()
            self.engine.add(request)

    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick):
        live = [name for name in self.out if not self.ended(name)]
        if live:
            name = live[pick % len(live)]
            assert self.engine.abort(name)
            self.aborted.add(name)

    @rule(times=st.integers(1, 12))
    def step(self, times):
        for _ in range(times):
            for delta in self.engine.step():
                self.out[delta.request_id].deltas.append(delta)

    @rule(seconds=st.sampled_from([0.1, 3.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(name=st.sampled_from(sorted(ADAPTERS)))
    def change_adapter(self, name):
        users = [n for n, r in self.requests.items() if r.adapter == name and not self.ended(n)]
        if name not in self.loaded:
            self.engine.load_adapter(ADAPTERS[name])
            self.loaded.add(name)
        elif users:
            with pytest.raises(InvalidArgumentError):
                self.engine.unload_adapter(name)
        else:
            self.engine.unload_adapter(name)
            self.loaded.discard(name)

    def ended(self, name):
        return name in self.aborted or self.out[name].finish_reason is not None

    @rule()
    def clear_cache(self):
        self.engine.clear_cache()

    @invariant()
    def accounts_add_up(self):
        self.engine.check_integrity()
        status = self.engine.status()
        assert status.running <= 5

    def teardown(self):
        if not hasattr(self, "requests"):
            return
        try:
            self.finish()
        finally:
            self.engine.close()
            self.dir.cleanup()

    def finish(self):
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work, "a sequence was lost or starved"
        self.engine.check_integrity()
        assert self.engine.status().blocks_used == 0
        for name, request in self.requests.items():
            self.judge(request, self.out[name])

    def judge(self, request, out):
        assert out.deltas, f"{request.request_id} never ended"
        assert sum(delta.finish_reason is not None for delta in out.deltas) == 1
        assert out.finish_reason is not None
        want = run_alone(request, ADAPTERS.values(), GRAMMARS)
        if out.finish_reason in ("stop", "length"):
            assert out.token_ids == want.token_ids
            assert out.logprobs == want.logprobs
            assert out.finish_reason == want.finish_reason
            assert out.deltas[0].prompt_logprobs == want.deltas[0].prompt_logprobs
        else:
            expected = "cancelled" if request.request_id in self.aborted else "error"
            assert out.finish_reason == expected
            assert out.token_ids == want.token_ids[: len(out.token_ids)]


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(600)
def test_whatever_happens_no_block_and_no_sequence_is_lost_and_every_output_is_that_of_the_sequence_alone():
    """Any interleaving of arrivals, aborts, deadlines, preemption, spill and speculation leaves each result as if it ran alone."""
    run_machine(60, 25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_holds_for_many_more_histories():
    """The machine finds nothing in twenty times as many histories."""
    run_machine(1200, 40)


def abort_at_random(total: int, seed: int) -> None:
    rng = random.Random(seed)
    engine = mock_engine(n_blocks=64, n_ctx=256, max_running=8, max_rows=64)
    live: list[str] = []
    added = 0
    while added < total or live:
        while added < total and len(live) < 24:
            prompt = bytes(rng.choice(b"abc ") for _ in range(rng.randint(1, 120)))
            engine.add(
                request_of(f"r{added}", prompt, sampling={"max_tokens": rng.randint(1, 60)}, priority=rng.randint(0, 4))
            )
            live.append(f"r{added}")
            added += 1
        if rng.random() < 0.8:
            engine.abort(live.pop(rng.randrange(len(live))))
        if rng.random() < 0.5:
            for delta in engine.step():
                if delta.finish_reason is not None and delta.request_id in live:
                    live.remove(delta.request_id)
    collect(engine, [])
    engine.check_integrity()
    status = engine.status()
    assert (status.blocks_used, status.running, status.waiting) == (0, 0, 0)
    assert status.aborted + status.finished + status.failed == total


def test_two_thousand_random_aborts_leave_no_block_held():
    """Sequences aborted while queued, prefilling or decoding give all blocks back."""
    abort_at_random(2_500, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_random_aborts_leave_no_block_held():
    """Ten thousand of them do, too."""
    abort_at_random(12_500, 2)
