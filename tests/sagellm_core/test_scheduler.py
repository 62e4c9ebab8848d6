"""The scheduler alone, with a fake runner: who gets rows, who waits, who gives blocks back."""

import gc

from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_core.kv_cache import KVCache
from sagellm_core.request import Phase, SequenceState
from sagellm_core.scheduler import Scheduler, SchedulerLimits
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.generation import Priority
from sagellm_protocol.prefix import root_hash
from sagellm_protocol.sampling import SamplingParams

AGEING_S = 10.0


class Bench:
    """A scheduler, a clock, and a runner that draws token 7 for everybody."""

    def __init__(self, n_blocks=64, rows=32, running=4, logits=64):
        self.kv = KVCache(n_blocks, 16, copy=lambda source, destination: None)
        self.scheduler = Scheduler(self.kv, SchedulerLimits(rows, logits, running))
        self.now = 0.0
        self.all: list[SequenceState] = []

    def add(self, n_prompt, max_tokens=1000, priority=Priority.NORMAL, deadline_s=None, want_draft=0):
        number = len(self.all)
        request = EngineRequest(
            request_id=f"r{number}",
            prompt_token_ids=(number,) * n_prompt,
            sampling=SamplingParams(max_tokens=max_tokens, seed=0),
            priority=priority,
            deadline_s=deadline_s,
        )
        seq = SequenceState.of(
            request, arrival=number, now=self.now, ageing_s=AGEING_S, root=root_hash(None, str(number))
        )
        seq.want_draft = want_draft
        self.all.append(seq)
        self.scheduler.add(seq)
        return seq

    def step(self):
        schedule = self.scheduler.schedule(self.now)
        rows = {}
        for work in schedule.work.values():
            rows[work.seq.arrival] = work.n_rows + work.n_draft
            draws = work.draws
            self.scheduler.advance(work.seq, work.n_rows)
            if draws:
                work.seq.tokens.append(7)
                if len(work.seq.tokens) >= work.seq.max_length:
                    self.scheduler.remove(work.seq)
        self.kv.check_integrity(self.scheduler.running)
        return rows, schedule


def test_decode_rows_come_first_and_prefill_takes_what_is_left():
    """One budget: each decoding sequence has its row, a long prompt gets the rest in chunks."""
    bench = Bench(rows=32)
    bench.add(10)
    bench.step()
    bench.add(100)
    chunks = [bench.step()[0] for _ in range(4)]
    assert [rows[0] for rows in chunks] == [1, 1, 1, 1]
    assert [rows[1] for rows in chunks] == [31, 31, 31, 7]


def test_the_budget_is_never_exceeded_and_never_left_unused_while_prompts_wait():
    """Every step has at most max_rows rows, and exactly that many while there is prefill to do."""
    bench = Bench(n_blocks=200, rows=40, running=8)
    for _ in range(8):
        bench.add(90)
    total = 0
    for _ in range(8 * 90 // 40 - 2):
        rows, _ = bench.step()
        assert sum(rows.values()) == 40
        total += sum(rows.values())


def test_a_short_prompt_is_not_held_up_by_a_long_one():
    """Of two prompts the oldest keeps a quarter of the budget, the shorter is done first."""
    bench = Bench(n_blocks=400, rows=64)
    long = bench.add(2000)
    bench.step()
    short = bench.add(40)
    before = long.computed
    bench.step()
    assert short.decoding
    assert long.computed == before + 64 - 40
    bench.add(60)
    before = long.computed
    bench.step()
    assert long.computed == before + (64 - 1) // 4


def test_the_more_urgent_band_starts_first():
    """Waiting sequences start in the order of their bands, then of arrival."""
    bench = Bench(running=1)
    bench.add(8, max_tokens=1)
    bench.step()
    order = [Priority.BACKGROUND, Priority.NORMAL, Priority.CRITICAL, Priority.NORMAL]
    seqs = [bench.add(8, max_tokens=1, priority=p) for p in order]
    started = []
    for _ in range(10):
        rows, _ = bench.step()
        started += [a for a in rows if a not in started]
    assert started == [seqs[2].arrival, seqs[1].arrival, seqs[3].arrival, seqs[0].arrival]


def test_age_counts_as_urgency():
    """A background sequence that has waited long enough goes before a fresh normal one."""
    bench = Bench(running=1)
    bench.add(8, max_tokens=40)
    bench.step()
    old = bench.add(8, priority=Priority.BACKGROUND)
    bench.now = 2 * AGEING_S + 1
    fresh = bench.add(8, priority=Priority.NORMAL)
    assert bench.scheduler.waiting == [old, fresh]


def test_a_critical_sequence_takes_the_place_of_a_background_one():
    """With all places taken the least urgent sequence of a lower band is pushed back, and comes back later."""
    bench = Bench(running=2)
    normal = bench.add(8)
    background = bench.add(8, priority=Priority.BACKGROUND)
    bench.step()
    critical = bench.add(8, priority=Priority.CRITICAL)
    bench.step()
    assert background.phase is Phase.WAITING
    assert {s.arrival for s in bench.scheduler.running} == {normal.arrival, critical.arrival}
    assert bench.scheduler.preemptions == 1
    bench.scheduler.remove(critical)
    bench.step()
    assert background.phase is Phase.RUNNING


def test_one_band_does_not_push_back_its_own():
    """A sequence of the same band waits for a place."""
    bench = Bench(running=1)
    first = bench.add(8)
    bench.step()
    second = bench.add(8)
    bench.step()
    assert (first.phase, second.phase) == (Phase.RUNNING, Phase.WAITING)


def test_the_youngest_of_the_lowest_band_gives_its_blocks_back():
    """When blocks lack, the victim is the least urgent running sequence, and it keeps its tokens."""
    bench = Bench(n_blocks=9, rows=64, running=3)
    old = bench.add(30, max_tokens=100)
    low = bench.add(30, max_tokens=100, priority=Priority.LOW)
    young = bench.add(30, max_tokens=100)
    while bench.scheduler.preemptions == 0:
        bench.step()
    assert low.phase is Phase.WAITING
    assert low.n_output > 0
    assert not low.blocks
    assert (old.phase, young.phase) == (Phase.RUNNING, Phase.RUNNING)
    while bench.scheduler.preemptions == 1:
        bench.step()
    assert young.phase is Phase.WAITING


def test_admission_leaves_room_for_what_runs():
    """A sequence starts only when it, what prompts still need, and a block for each running sequence fit."""
    bench = Bench(n_blocks=8, rows=16, running=4)
    bench.add(64)
    bench.step()
    late = bench.add(60)
    bench.step()
    assert late.phase is Phase.WAITING


def test_guesses_use_only_what_is_left():
    """Guessed rows take no row, block or logit row from anybody's own work."""
    bench = Bench(n_blocks=64, rows=24, running=4, logits=24)
    for _ in range(4):
        bench.add(4, want_draft=6)
    bench.step()
    rows, schedule = bench.step()
    assert all(1 <= n <= 7 for n in rows.values())
    assert sum(rows.values()) <= 24 - 24 // 4
    assert sum(work.logit_rows for work in schedule.work.values()) <= 24


def test_no_guess_beyond_the_length_limit():
    """A sequence that may emit one more token guesses nothing."""
    bench = Bench()
    bench.add(4, max_tokens=2, want_draft=6)
    bench.step()
    rows, _ = bench.step()
    assert rows == {0: 1}


def test_deadlines_are_met_or_reported():
    """At its deadline a sequence is removed, waiting or running, and its blocks are free."""
    bench = Bench(running=1)
    running = bench.add(8, deadline_s=4.0)
    waiting = bench.add(8, deadline_s=2.0)
    bench.step()
    bench.now = 2.0
    assert bench.step()[1].expired == [waiting]
    bench.now = 5.0
    assert bench.step()[1].expired == [running]
    assert bench.kv.n_used == 0


def test_ended_sequences_do_not_stay_until_their_deadline():
    """However far the deadlines are away, of sequences that ended only a bounded number is still in memory."""
    bench = Bench()
    for _ in range(500):
        bench.scheduler.remove(bench.add(8, deadline_s=3600.0))
        bench.all[-1] = None
    gc.collect()
    assert sum(type(thing) is SequenceState for thing in gc.get_objects()) < 128


@given(
    arrivals=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30
    ),
    n_blocks=st.integers(8, 24),
    rows=st.integers(5, 48),
)
@settings(max_examples=150, deadline=None)
def test_everybody_ends_and_the_most_urgent_always_gets_on(arrivals, n_blocks, rows):
    """No starvation: in every step the most urgent sequence that runs has rows, and all sequences end."""
    bench = Bench(n_blocks=n_blocks, rows=rows, running=4)
    for n_prompt, max_tokens, priority, pause in arrivals:
        bench.add(n_prompt, max_tokens, priority)
        for _ in range(pause):
            bench.step()
            bench.now += 0.5
    for _ in range(6000):
        if not (bench.scheduler.running or bench.scheduler.waiting):
            break
        before = list(bench.scheduler.running)
        given_rows, _ = bench.step()
        bench.now += 0.5
        if before:
            assert min(bench.all[a].urgency for a in given_rows) <= before[0].urgency
    assert all(seq.phase is Phase.FINISHED for seq in bench.all)
    assert all(seq.n_output == seq.sampling.max_tokens for seq in bench.all)
    assert bench.kv.n_used == 0
