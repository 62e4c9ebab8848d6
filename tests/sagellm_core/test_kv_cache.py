"""Blocks: found again by content, shared until somebody writes, evicted in order, never lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_core.kv_cache import KVCache
from sagellm_core.request import SequenceState
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.prefix import block_hashes, root_hash
from sagellm_protocol.sampling import SamplingParams

SIZE = 4


class Pool:
    """A cache of small blocks whose content is simulated, so that a wrong share is seen."""

    def __init__(self, n_blocks=16, **how):
        self.content = [[None] * SIZE for _ in range(n_blocks)]
        self.copies = []
        self.kv = KVCache(n_blocks, SIZE, copy=self.copy, **how)
        self.count = 0

    def copy(self, source, destination):
        self.copies.append((source, destination))
        self.content[destination] = list(self.content[source])

    def sequence(self, tokens, salt="", emitted=(), priority=2):
        self.count += 1
        request = EngineRequest(
            request_id=str(self.count),
            prompt_token_ids=tuple(tokens),
            emitted_token_ids=tuple(emitted),
            sampling=SamplingParams(max_tokens=100, seed=0),
            priority=priority,
        )
        return SequenceState.of(request, arrival=self.count, now=0.0, ageing_s=1.0, root=root_hash(None, salt))

    def start(self, tokens, salt="", emitted=()):
        seq = self.sequence(tokens, salt, emitted)
        self.kv.attach(seq, self.kv.match(seq))
        return seq

    def compute(self, seq, n=None):
        end = len(seq.tokens) if n is None else seq.computed + n
        if not self.kv.grow(seq, end):
            return False
        before = seq.computed
        for position in range(before, end):
            self.content[seq.blocks[position // SIZE]][position % SIZE] = seq.tokens[position]
        seq.computed = end
        self.kv.publish(seq, before)
        return True

    def held(self, seq):
        return [self.content[seq.blocks[p // SIZE]][p % SIZE] for p in range(seq.computed)]


def test_full_blocks_are_found_again_after_release():
    """What a sequence computed is there for the next one with the same beginning."""
    pool = Pool()
    a = pool.start(range(10))
    pool.compute(a)
    pool.kv.release(a)
    assert (pool.kv.n_cached, pool.kv.n_free, pool.kv.n_used) == (2, 14, 0)
    b = pool.start([*range(8), 99, 98])
    assert b.computed == 8
    assert pool.held(b) == list(range(8))


def test_salt_separates_and_tokens_are_compared():
    """Another root finds nothing; a name whose tokens differ is no hit."""
    pool = Pool()
    a = pool.start(range(8), salt="one")
    pool.compute(a)
    assert pool.start(range(8), salt="two").computed == 0
    forged = pool.sequence([9, 9, 9, 9, 1], salt="one")
    forged.hashes = list(a.hashes)  # as if the hash had collided
    assert pool.kv.match(forged).resident == []


def test_a_whole_prompt_in_the_cache_leaves_its_last_token_to_compute():
    """At least one row is needed to draw from; its block is shared, so it is copied before the write."""
    pool = Pool()
    a = pool.start(range(8))
    pool.compute(a)
    b = pool.start(range(8))
    assert b.computed == 7
    pool.compute(b)
    assert len(pool.copies) == 1
    assert b.blocks[0] == a.blocks[0]
    assert b.blocks[1] != a.blocks[1]
    assert pool.held(b) == list(range(8))


def test_a_partial_block_at_the_end_of_a_prompt_is_shared_while_its_owner_lives():
    """Copy on write: whoever writes to a shared block first gets a copy, the other keeps the original."""
    pool = Pool()
    a = pool.start(range(6))
    pool.compute(a)
    b = pool.start(range(6))
    assert (b.computed, b.blocks) == (5, a.blocks)
    a.tokens += [50, 51]
    pool.compute(a)
    b.tokens += [60, 61]
    pool.compute(b)
    assert pool.held(a) == [0, 1, 2, 3, 4, 5, 50, 51]
    assert pool.held(b) == [0, 1, 2, 3, 4, 5, 60, 61]
    assert len(pool.copies) == 1
    pool.kv.check_integrity([a, b])


def test_a_partial_block_is_not_found_after_its_owner_left():
    """Only full blocks stay cached."""
    pool = Pool()
    a = pool.start(range(6))
    pool.compute(a)
    pool.kv.release(a)
    assert pool.start(range(6)).computed == 4


def test_what_another_sequence_is_computing_is_worth_waiting_for():
    """A match says so when the next block is promised, and no more when its maker gave up."""
    pool = Pool()
    a = pool.start(range(12))
    pool.compute(a, 4)
    b = pool.sequence(range(12))
    assert pool.kv.match(b).promised
    pool.kv.release(a)
    found = pool.kv.match(b)
    assert (found.promised, found.tokens) == (False, 4)


def test_nobody_waits_for_a_less_urgent_promise():
    """A critical sequence computes its prompt itself although a background one is about to."""
    pool = Pool()
    maker = pool.sequence(range(12), priority=4)
    pool.kv.attach(maker, pool.kv.match(maker))
    assert pool.kv.match(pool.sequence(range(12), priority=4)).promised
    assert not pool.kv.match(pool.sequence(range(12), priority=0)).promised


def test_the_least_recently_used_end_is_evicted_first():
    """Of one sequence the last block goes first, of two sequences the one that was released first."""
    pool = Pool(n_blocks=4)
    a = pool.start(range(8))
    pool.compute(a)
    pool.kv.release(a)
    b = pool.start(range(100, 108))
    pool.compute(b)
    pool.kv.release(b)
    c = pool.start([200])
    pool.compute(c)
    assert pool.kv.counters.evictions == 1
    assert pool.kv.match(pool.sequence([*range(8), 1])).tokens == 4
    assert pool.kv.match(pool.sequence([*range(100, 108), 1])).tokens == 8


def test_growing_beyond_what_is_there_changes_nothing():
    """Growing is all or nothing."""
    pool = Pool(n_blocks=3)
    a = pool.start(range(8))
    pool.compute(a)
    b = pool.start(range(50, 60))
    assert not pool.compute(b)
    assert b.blocks == []
    pool.kv.check_integrity([a, b])


def test_events_name_blocks_as_the_control_plane_does():
    """Stored blocks have the names of sagellm_protocol.prefix, with their parents."""
    pool = Pool()
    a = pool.start(range(9))
    pool.compute(a)
    names = block_hashes(range(9), block_size=SIZE)
    events = pool.kv.events_after(0)
    assert [e.block_hash for e in events] == names
    assert [e.parent_hash for e in events] == [root_hash(None, ""), names[0]]
    assert pool.kv.events_after(1) == events[1:]


def test_caching_can_be_off():
    """Without prefix caching nothing is found and everything is free after release."""
    pool = Pool(caching=False)
    a = pool.start(range(12))
    pool.compute(a)
    pool.kv.release(a)
    assert (pool.kv.n_cached, pool.kv.n_free) == (0, 16)
    assert pool.start(range(12)).computed == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_blocks_always_hold_what_their_sequences_think(data):
    """Random starts, writes, forks and releases in a small pool: accounts add up and contents are right."""
    pool = Pool(n_blocks=data.draw(st.integers(4, 14)))
    live = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["start", "grow", "grow", "release", "forget"]))
        if action == "start" and len(live) < 4:
            seq = pool.sequence(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=11)))
            found = pool.kv.match(seq)
            pool.kv.attach(seq, found)
            live.append(seq)
        elif action == "grow" and live:
            seq = data.draw(st.sampled_from(live))
            if seq.computed == len(seq.tokens):
                seq.tokens.append(data.draw(st.integers(0, 1)))
            pool.compute(seq, data.draw(st.integers(1, len(seq.tokens) - seq.computed)))
        elif action == "release" and live:
            pool.kv.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
        elif action == "forget":
            pool.kv.forget()
        pool.kv.check_integrity(live)
        for seq in live:
            assert pool.held(seq) == seq.tokens[: seq.computed]
