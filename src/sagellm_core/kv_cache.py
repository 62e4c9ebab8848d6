"""KV blocks of one engine: who holds them, what is in them, and which of them goes first.

Pure bookkeeping over block numbers. A block is *free* (nothing in it), *used* (held by at least one sequence) or *cached*
(held by nobody, found by its content's name until its room is needed): free + cached + used = total, always.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sagellm_core.request import SequenceState
from sagellm_protocol.prefix import BlockEvent, BlockSnapshot, block_hash

__all__ = ["BlockCopier", "KVCache", "KVCounters", "Match", "SpillTier"]

EVENTS_KEPT = 1 << 14
_NOBODY = 1 << 30


class BlockCopier(Protocol):
    """Copies a block on the device, at once: no step is running while blocks are handed out."""

    def __call__(self, source: int, destination: int, /) -> None:
        """Copy all of `source`."""
        ...


class SpillTier(Protocol):
    """A slower place for blocks that are evicted."""

    def store(self, name: bytes, token_ids: tuple[int, ...], block: int) -> None:
        """Keep a copy of `block`, if there is room."""
        ...

    def holds(self, name: bytes, token_ids: tuple[int, ...]) -> bool:
        """Whether a block of that name and those tokens is there."""
        ...

    def load(self, name: bytes, block: int) -> bool:
        """Fill `block`; False if the copy turned out to be gone or damaged."""
        ...


class _Block:
    """A block and its place in at most one of the two lists."""

    __slots__ = ("name", "next", "number", "parent", "prev", "refs", "tail_name", "token_ids")

    def __init__(self, number: int) -> None:
        self.number = number
        self.refs = 0
        self.name: bytes | None = None
        self.parent = b""
        self.token_ids: tuple[int, ...] = ()
        self.tail_name: bytes | None = None
        self.prev = self
        self.next = self


class _Ring:
    """Intrusive doubly linked list: append and remove in constant time without allocating."""

    def __init__(self) -> None:
        self._head = _Block(-1)
        self.size = 0

    def append(self, block: _Block) -> None:
        last = self._head.prev
        last.next = self._head.prev = block
        block.prev, block.next = last, self._head
        self.size += 1

    def remove(self, block: _Block) -> None:
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = block
        self.size -= 1

    def first(self) -> _Block:
        return self._head.next

    def __iter__(self) -> Iterator[_Block]:
        block = self._head.next
        while block is not self._head:
            yield block
            block = block.next


@dataclass(slots=True)
class KVCounters:
    """What has happened since the cache was made."""

    evictions: int = 0
    evict_seconds: float = 0.0
    queried_tokens: int = 0
    hit_tokens: int = 0
    copied_blocks: int = 0
    spill_hits: int = 0


@dataclass(slots=True)
class Match:
    """What the cache already holds of a sequence.

    Attributes:
        resident: blocks in memory, first to last.
        tokens: how many tokens they hold.
        spilled: names that follow them and lie in the spill tier.
        promised: the next block is being computed by another sequence: waiting for it saves the work.
    """

    resident: list[int] = field(default_factory=list)
    tokens: int = 0
    spilled: list[bytes] = field(default_factory=list)
    promised: bool = False


class KVCache:
    """The block pool. All methods are called from the step loop only.

    Args:
        n_blocks: blocks on the device.
        block_size: tokens a block.
        copy: copies a block that several sequences hold before one of them writes to it.
        caching: whether full blocks stay findable.
        spill: where evicted blocks go; None drops them.
        clock: seconds, to measure evictions by.
    """

    def __init__(
        self,
        n_blocks: int,
        block_size: int,
        *,
        copy: BlockCopier,
        caching: bool = True,
        spill: SpillTier | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.block_size = block_size
        self.caching = caching
        self.counters = KVCounters()
        self._copy = copy
        self._clock = clock
        self._blocks = [_Block(number) for number in range(n_blocks)]
        self._free, self._cached = _Ring(), _Ring()
        self._by_name: dict[bytes, _Block] = {}
        self._tails: dict[bytes, _Block] = {}
        self._promised: dict[bytes, list[int]] = {}
        self._spill = spill
        self._events: deque[BlockEvent] = deque(maxlen=EVENTS_KEPT)
        self._event_seq = 0
        for block in self._blocks:
            self._free.append(block)

    # ---------------------------------------------------------------- counts

    @property
    def n_blocks(self) -> int:
        """All blocks."""
        return len(self._blocks)

    @property
    def n_free(self) -> int:
        """Blocks with nothing in them."""
        return self._free.size

    @property
    def n_cached(self) -> int:
        """Blocks that nobody holds and that can be found."""
        return self._cached.size

    @property
    def n_available(self) -> int:
        """Blocks that can be had now."""
        return self._free.size + self._cached.size

    @property
    def n_used(self) -> int:
        """Blocks held by sequences."""
        return self.n_blocks - self.n_available

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that `n_tokens` tokens take."""
        return -(-n_tokens // self.block_size)

    def idle(self, numbers: Sequence[int]) -> int:
        """Return how many of these blocks nobody holds."""
        return sum(self._blocks[number].refs == 0 for number in numbers)

    # ---------------------------------------------------------------- taking

    def match(self, seq: SequenceState) -> Match:
        """Return what is already there of `seq`; changes nothing."""
        found = Match()
        if not self.caching:
            return found
        limit, size = seq.reusable, self.block_size
        for index, name in enumerate(self._names(seq, limit)):
            block = self._by_name.get(name)
            if block is None or block.token_ids != tuple(seq.tokens[index * size : (index + 1) * size]):
                self._match_beyond(seq, index, found)
                return found
            found.resident.append(block.number)
            found.tokens += size
        self._match_tail(seq, limit, found)
        return found

    def attach(self, seq: SequenceState, found: Match) -> None:
        """Give `seq`, which holds nothing, the blocks of `found`, and note what it is going to compute."""
        assert not seq.blocks
        for number in found.resident:
            self._hold(self._blocks[number])
            seq.blocks.append(number)
        seq.computed = found.tokens
        for name in found.spilled:
            if not self._unspill(seq, name):
                break
        seq.computed = min(seq.computed, len(seq.tokens) - 1)
        if not seq.preemptions:
            seq.cached_tokens = min(seq.computed, seq.n_prompt)
            self.counters.queried_tokens += seq.n_prompt
            self.counters.hit_tokens += seq.cached_tokens
        if self.caching:
            self._promise(seq)

    def grow(self, seq: SequenceState, n_tokens: int) -> bool:
        """Make room for tokens ``seq.computed … n_tokens - 1`` that are about to be written.

        Blocks that others hold too are copied first. False, and nothing changed, if blocks lack.
        """
        first = seq.computed // self.block_size
        shared = [i for i in range(first, len(seq.blocks)) if self._blocks[seq.blocks[i]].refs > 1]
        missing = max(0, self.blocks_for(n_tokens) - len(seq.blocks))
        if len(shared) + missing > self.n_available:
            return False
        for index in shared:
            fresh = self._take()
            self._copy(seq.blocks[index], fresh.number)
            self._drop(self._blocks[seq.blocks[index]])
            self.counters.copied_blocks += 1
            seq.blocks[index] = fresh.number
        seq.blocks.extend(self._take().number for _ in range(missing))
        return True

    # ------------------------------------------------------------ giving back

    def release(self, seq: SequenceState) -> None:
        """Take all blocks from `seq`: what can be found again becomes cached, the end of the sequence is evicted first."""
        self._break_promises(seq)
        for number in reversed(seq.blocks):
            self._drop(self._blocks[number])
        seq.blocks.clear()
        seq.computed = 0

    def publish(self, seq: SequenceState, before: int) -> None:
        """Make the blocks findable that became full when ``seq.computed`` rose from `before`."""
        if not self.caching:
            return
        size = self.block_size
        self._name(seq, seq.computed)
        for index in range(before // size, seq.computed // size):
            name = seq.hashes[index]
            self._keep_promise(seq, name)
            parent = seq.hashes[index - 1] if index else seq.root
            self._register(self._blocks[seq.blocks[index]], name, parent, tuple(seq.tokens[index * size :][:size]))
        if before < seq.n_prompt <= seq.computed and seq.n_prompt % size:
            self._publish_tail(seq)

    def resident(self, names: Sequence[bytes]) -> list[int]:
        """Return the blocks that hold the first of these names, up to the first that is not in memory."""
        found: list[int] = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block.number)
        return found

    def insert(self, name: bytes, parent: bytes, token_ids: tuple[int, ...]) -> int | None:
        """Return a block that becomes cached under `name`, for the caller to fill at once; None if there is no room.

        The name must not be there yet (`resident`). No step may run before the block is filled.
        """
        if not self.caching or not self.n_available:
            return None
        block = self._take()
        self._register(block, name, parent, token_ids)
        self._drop(block)
        return block.number

    def forget(self) -> int:
        """Drop everything that is cached; return how many blocks that freed."""
        dropped = 0
        while self._cached.size:
            block = self._cached.first()
            self._cached.remove(block)
            self._unregister(block)
            self._free.append(block)
            dropped += 1
        return dropped

    # ---------------------------------------------------------------- events

    def snapshot(self) -> BlockSnapshot:
        """Return the names of all blocks that can be found: cached ones, the next to be evicted first, then used ones."""
        cached = [block.name for block in self._cached if block.name is not None]
        used = [name for name, block in self._by_name.items() if block.refs]
        return BlockSnapshot(seq=self._event_seq, names=(*cached, *used))

    def events_after(self, seq: int) -> list[BlockEvent]:
        """Return the events numbered above `seq`; a gap at the front means that older ones are gone."""
        return [event for event in self._events.copy() if event.seq > seq]

    def check_integrity(self, holders: Sequence[SequenceState]) -> None:
        """Check every invariant against the sequences that should hold blocks.

        Raises:
            AssertionError: an invariant is broken; the message names it.
        """
        refs: dict[int, int] = {}
        for seq in holders:
            for number in seq.blocks:
                refs[number] = refs.get(number, 0) + 1
        free, cached = set(self._free), set(self._cached)
        assert len(free) == self._free.size, "the free list and its length differ"
        assert len(cached) == self._cached.size, "the cached list and its length differ"
        assert not free & cached, "a block is free and cached"
        for block in self._blocks:
            held = refs.get(block.number, 0)
            assert block.refs == held, f"block {block.number} counts {block.refs} holders, {held} sequences hold it"
            assert (held > 0) + (block in free) + (block in cached) == 1, f"block {block.number} has not one state"
            named = block.name is not None and self._by_name.get(block.name) is block
            assert named or block.name is None, f"block {block.number} has a name by which it is not found"
            assert block not in cached or named, f"block {block.number} is cached but cannot be found"
            assert block not in free or block.name is None, f"block {block.number} is free but named"
        assert self.n_free + self.n_cached + self.n_used == self.n_blocks, "free + cached + used is not the total"
        assert len(self._by_name) == sum(b.name is not None for b in self._blocks), "a name without its block"
        promised = sum(len(seq.promised) for seq in holders)
        assert sum(map(len, self._promised.values())) == promised, "a promise without its sequence"

    # --------------------------------------------------------------- private

    def _name(self, seq: SequenceState, n_tokens: int) -> None:
        """Name the full blocks in the first `n_tokens` tokens, once."""
        size, names = self.block_size, seq.hashes
        while (len(names) + 1) * size <= n_tokens:
            start = len(names) * size
            names.append(block_hash(names[-1] if names else seq.root, seq.tokens[start : start + size]))

    def _names(self, seq: SequenceState, n_tokens: int) -> list[bytes]:
        self._name(seq, n_tokens)
        return seq.hashes[: n_tokens // self.block_size]

    def _tail(self, seq: SequenceState) -> tuple[bytes, tuple[int, ...]]:
        """Name and tokens of the prompt's last, partial block."""
        full = seq.n_prompt // self.block_size
        names = self._names(seq, full * self.block_size)
        tokens = tuple(seq.tokens[full * self.block_size : seq.n_prompt])
        return block_hash(names[-1] if names else seq.root, tokens), tokens

    def _match_beyond(self, seq: SequenceState, index: int, found: Match) -> None:
        name = seq.hashes[index]
        if self._is_promised(seq, name):
            found.promised = True
        elif self._spill is not None:
            size = self.block_size
            for position, later in enumerate(seq.hashes[index : seq.reusable // size], index):
                if not self._spill.holds(later, tuple(seq.tokens[position * size : (position + 1) * size])):
                    break
                found.spilled.append(later)

    def _match_tail(self, seq: SequenceState, limit: int, found: Match) -> None:
        size = self.block_size
        if limit < seq.n_prompt or not seq.n_prompt % size or len(found.resident) != seq.n_prompt // size:
            return
        name, tokens = self._tail(seq)
        block = self._tails.get(name)
        if block is not None and block.token_ids[: len(tokens)] == tokens:
            found.resident.append(block.number)
            found.tokens = seq.n_prompt
        elif self._is_promised(seq, name):
            found.promised = True

    def _promise(self, seq: SequenceState) -> None:
        full = seq.n_prompt - seq.n_prompt % self.block_size
        done = min(seq.computed, full) // self.block_size
        seq.promised = self._names(seq, full)[done:]
        if seq.computed < seq.n_prompt - 1 and seq.n_prompt % self.block_size:
            seq.promised.append(self._tail(seq)[0])
        for name in seq.promised:
            self._promised.setdefault(name, []).append(seq.request.priority)

    def _keep_promise(self, seq: SequenceState, name: bytes) -> None:
        if name in seq.promised:
            seq.promised.remove(name)
            self._forget_promise(seq, name)

    def _break_promises(self, seq: SequenceState) -> None:
        for name in seq.promised:
            self._forget_promise(seq, name)
        seq.promised = []

    def _forget_promise(self, seq: SequenceState, name: bytes) -> None:
        self._promised[name].remove(seq.request.priority)
        if not self._promised[name]:
            del self._promised[name]

    def _is_promised(self, seq: SequenceState, name: bytes) -> bool:
        """Whether a sequence that is no less urgent than `seq` is about to compute the block: only that is worth a wait."""
        return min(self._promised.get(name, (_NOBODY,))) <= seq.request.priority

    def _publish_tail(self, seq: SequenceState) -> None:
        name, tokens = self._tail(seq)
        self._keep_promise(seq, name)
        block = self._blocks[seq.blocks[seq.n_prompt // self.block_size]]
        if block.name is None and block.tail_name is None and name not in self._tails:
            block.tail_name, block.token_ids = name, tokens
            self._tails[name] = block

    def _register(self, block: _Block, name: bytes, parent: bytes, token_ids: tuple[int, ...]) -> None:
        if block.name is not None or name in self._by_name:
            return  # the same content twice: the first stays the one that is found
        block.name, block.parent, block.token_ids = name, parent, token_ids
        self._by_name[name] = block
        self._emit("stored", name, parent)

    def _unregister(self, block: _Block) -> None:
        if block.name is not None:
            del self._by_name[block.name]
            self._emit("removed", block.name)
            block.name = None
        self._forget_tail(block)
        block.token_ids = ()

    def _forget_tail(self, block: _Block) -> None:
        if block.tail_name is not None:
            del self._tails[block.tail_name]
            block.tail_name = None

    def _take(self) -> _Block:
        if self._free.size:
            block = self._free.first()
            self._free.remove(block)
        else:
            block = self._evict()
        block.refs = 1
        return block

    def _evict(self) -> _Block:
        began = self._clock()
        block = self._cached.first()
        self._cached.remove(block)
        if self._spill is not None and block.name is not None:
            self._spill.store(block.name, block.token_ids, block.number)
        self._unregister(block)
        self.counters.evictions += 1
        self.counters.evict_seconds += self._clock() - began
        return block

    def _hold(self, block: _Block) -> None:
        if block.refs == 0:
            self._cached.remove(block)
        block.refs += 1

    def _drop(self, block: _Block) -> None:
        block.refs -= 1
        if block.refs:
            return
        self._forget_tail(block)
        if block.name is not None:
            self._cached.append(block)
        else:
            block.token_ids = ()
            self._free.append(block)

    def _unspill(self, seq: SequenceState, name: bytes) -> bool:
        assert self._spill is not None
        if not self.n_available:
            return False
        block = self._take()
        if not self._spill.load(name, block.number):
            self._drop(block)
            return False
        seq.blocks.append(block.number)
        start = seq.computed
        seq.computed += self.block_size
        parent = seq.hashes[start // self.block_size - 1] if start else seq.root
        self._register(block, name, parent, tuple(seq.tokens[start : seq.computed]))
        self.counters.spill_hits += 1
        return True

    def _emit(self, kind: Literal["stored", "removed"], name: bytes, parent: bytes = b"") -> None:
        self._event_seq += 1
        self._events.append(BlockEvent(seq=self._event_seq, kind=kind, block_hash=name, parent_hash=parent))
