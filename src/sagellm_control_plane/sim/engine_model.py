"""A simulated engine: continuous batching with chunked prefill, batch-dependent decode steps, paged KV with a prefix cache.

Every step serves one token to each decoding sequence and fills the rest of its token budget with prefill, first come first served or
by `EngineConstants.oldest_share`:

    step time = step_s + per_sequence_s * sequences + per_token_s * decoding context + prefill tokens / prefill_tps

Steps between two changes of the batch differ only by the growing context, so that a run of k of them has a closed form: one event
stands for a run, not for a step. A run is cut at the next step boundary when a request arrives.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable
from math import ceil, sqrt

import msgspec

__all__ = ["EngineConstants", "SimEngine", "SimSequence"]


class EngineConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine model is made of.

    Raises:
        ValueError: a number that no engine has; the message names it.

    Attributes:
        prefill_tps: prompt tokens computed a second.
        step_s: fixed part of a step.
        per_sequence_s: for each sequence in a step.
        per_token_s: for each token of context of the decoding sequences.
        step_tokens: token budget of a step, decode and prefill together.
        oldest_share: what the oldest of several prompts gets of a step's prefill, the rest goes to the shortest ones. 1 is first come first
            served, as vLLM does; our own engines give a quarter.
        max_sequences: sequences in a batch.
        block_size: tokens of a KV block.
        n_blocks: KV blocks.
        prefix_cache: whether prompts find their prefix.
        load_s: from the start of a process to READY.
    """

    prefill_tps: float = 16000.0
    step_s: float = 0.005
    per_sequence_s: float = 0.0001
    per_token_s: float = 1e-8
    step_tokens: int = 512
    oldest_share: float = 1.0
    max_sequences: int = 256
    block_size: int = 512
    n_blocks: int = 4096
    prefix_cache: bool = True
    load_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("prefill_tps", "step_tokens", "max_sequences", "block_size", "n_blocks", "oldest_share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must be above 0")
        for name in ("step_s", "per_sequence_s", "per_token_s", "load_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must not be below 0")


class SimSequence:
    """One attempt of a request on a simulated engine."""

    __slots__ = (
        "attempt",
        "blocks",
        "cached",
        "done_prefill",
        "finish_step",
        "first_at",
        "generated",
        "handed",
        "held",
        "output_tokens",
        "prompt_tokens",
        "request_id",
        "serial",
        "start_step",
        "state",
    )

    def __init__(
        self, request_id: str, attempt: int, prompt_tokens: int, output_tokens: int, blocks: tuple[bytes, ...]
    ) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.blocks = blocks
        self.cached = 0
        self.done_prefill = 0
        self.generated = 0
        self.start_step = 0
        self.finish_step = 0
        self.first_at: float | None = None
        self.held = 0
        self.handed = 0
        self.serial = 0
        self.state = "waiting"

    @property
    def uncomputed(self) -> int:
        """Tokens to prefill before the next one of the output."""
        return self.prompt_tokens + self.generated - self.cached - self.done_prefill


class _PrefixCache:
    """Blocks by name with reference counts; unreferenced ones stay until they are evicted, least recently used first.

    Attributes:
        refs: users of each block that is here.
        idle: the blocks that nobody uses now, least recently used first.
    """

    __slots__ = ("evicted", "idle", "refs")

    def __init__(self) -> None:
        self.refs: dict[bytes, int] = {}
        self.idle: OrderedDict[bytes, None] = OrderedDict()
        self.evicted = 0

    def match(self, blocks: tuple[bytes, ...]) -> int:
        """Leading blocks that are here."""
        count = 0
        for name in blocks:
            if name not in self.refs:
                break
            count += 1
        return count

    def acquire(self, blocks: tuple[bytes, ...]) -> None:
        """Use blocks, making those that are missing."""
        refs, idle = self.refs, self.idle
        for name in blocks:
            count = refs.get(name)
            if count is None:
                refs[name] = 1
            else:
                if count == 0:
                    del idle[name]
                refs[name] = count + 1

    def release(self, blocks: tuple[bytes, ...]) -> None:
        """Stop using blocks, leaves first: they are evicted before their roots."""
        refs, idle = self.refs, self.idle
        for name in reversed(blocks):
            refs[name] -= 1
            if refs[name] == 0:
                idle[name] = None

    def evict(self, count: int) -> int:
        """Drop up to `count` unused blocks; return how many."""
        dropped = 0
        while dropped < count and self.idle:
            name, _none = self.idle.popitem(last=False)
            del self.refs[name]
            dropped += 1
        self.evicted += dropped
        return dropped

    def clear(self) -> None:
        """The engine lost its memory."""
        self.refs.clear()
        self.idle.clear()


class SimEngine:
    """Advance it with `advance(now)`, then read `next_at`; what happened comes back as (kind, sequence, time)."""

    __slots__ = (
        "_context",
        "_decoding",
        "_finish",
        "_prefilling",
        "_private",
        "_run_a",
        "_run_c",
        "_run_shares",
        "_run_start",
        "_run_steps",
        "_serial",
        "_step",
        "_waiting",
        "alive",
        "cache",
        "constants",
        "engine_id",
        "next_at",
        "preemptions",
        "sequences",
        "slow",
        "stalled",
        "version",
    )

    def __init__(self, engine_id: str, constants: EngineConstants) -> None:
        self.engine_id = engine_id
        self.constants = constants
        self.cache = _PrefixCache()
        self.sequences: dict[tuple[str, int], SimSequence] = {}
        self.alive = True
        self.slow = 1.0
        self.stalled = False
        self.preemptions = 0
        self.next_at = float("inf")
        self.version = 0
        self._waiting: deque[SimSequence] = deque()
        self._prefilling: deque[SimSequence] = deque()
        self._decoding = 0
        self._context = 0
        self._private = 0
        self._finish: list[tuple[int, int, SimSequence]] = []
        self._step = 0
        self._serial = 0
        self._run_start = 0.0
        self._run_steps = 0
        self._run_a = 0.0
        self._run_c = 0.0
        self._run_shares: dict[SimSequence, int] = {}

    @property
    def steps(self) -> int:
        """Decode steps done: the progress counter."""
        return self._step

    @property
    def waiting(self) -> int:
        """Sequences that are not in the batch."""
        return len(self._waiting)

    # -- from outside ----------------------------------------------------------------------------------------------

    def submit(self, sequence: SimSequence, now: float) -> None:
        """Take in a sequence at `now`; call `advance(now)` before."""
        self._serial += 1
        sequence.serial = self._serial
        self.sequences[sequence.request_id, sequence.attempt] = sequence
        self._waiting.append(sequence)
        if self._run_steps:
            # A longer run may wait for nothing but the end of a decode: cut it where the newcomer can join.
            if len(self._prefilling) + self._decoding < self.constants.max_sequences:
                self._cut(now)
        else:
            self._plan(now)

    def abort(self, request_id: str, attempt: int, now: float) -> bool:
        """Drop a sequence; its blocks are free at once."""
        sequence = self.sequences.pop((request_id, attempt), None)
        if sequence is None:
            return False
        if sequence.state == "waiting":
            self._waiting.remove(sequence)
        elif sequence.state == "prefill":
            self._prefilling.remove(sequence)
            self._free(sequence)
        else:
            self._leave_decode(sequence)
            self._free(sequence)
        sequence.state = "gone"
        if self._run_steps:
            self._cut(now)
        return True

    def crash(self) -> list[SimSequence]:
        """Lose everything; return what was running."""
        lost = list(self.sequences.values())
        for sequence in lost:
            sequence.state = "gone"
        self.__init__(self.engine_id, self.constants)  # type: ignore[misc]
        self.alive = False
        self.version += 1
        return lost

    # -- time ------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> list[tuple[str, SimSequence, float]]:
        """Finish every run that ends at or before `now`; return first tokens and finished sequences, in order."""
        out: list[tuple[str, SimSequence, float]] = []
        while self._run_steps and self.next_at <= now and not self.stalled:
            self._complete(out)
        return out

    def _run_time(self, steps: int) -> float:
        return (steps * self._run_a + self._run_c * steps * (steps - 1) / 2.0) * self.slow

    def _cut(self, now: float) -> None:
        """Shorten the run to the step that is under way at `now`."""
        elapsed = (now - self._run_start) / self.slow
        a, c = self._run_a - self._run_c / 2.0, self._run_c / 2.0
        if elapsed <= 0.0:
            steps = 1
        elif c < 1e-15:
            steps = int(elapsed / a) + 1 if a > 0.0 else self._run_steps
        else:
            steps = int((sqrt(a * a + 4.0 * c * elapsed) - a) / (2.0 * c)) + 1
        if steps < self._run_steps:
            self._run_steps = max(steps, 1)
            self.next_at = self._run_start + self._run_time(self._run_steps)

    def _complete(self, out: list[tuple[str, SimSequence, float]]) -> None:
        """The run is over: count its steps, hand out first tokens and finished sequences, plan the next one."""
        now, steps = self.next_at, self._run_steps
        self._run_steps = 0
        self._step += steps
        self._context += steps * self._decoding
        self._private += steps * self._decoding
        self._spend_prefill(steps, now, out)
        finish = self._finish
        while finish and finish[0][0] <= self._step:
            _step, _serial, sequence = heapq.heappop(finish)
            if sequence.state != "decode" or sequence.finish_step > self._step:
                continue
            self._leave_decode(sequence)
            self._end(sequence)
            out.append(("finish", sequence, now))
        self._plan(now)

    def _spend_prefill(self, steps: int, now: float, out: list[tuple[str, SimSequence, float]]) -> None:
        for sequence, tokens in self._run_shares.items():
            if sequence.state != "prefill":
                continue  # aborted meanwhile
            sequence.done_prefill += tokens * steps
            if sequence.uncomputed == 0:
                self._prefilling.remove(sequence)
                self._begin_decode(sequence, now, out)

    def _begin_decode(self, sequence: SimSequence, now: float, out: list[tuple[str, SimSequence, float]]) -> None:
        sequence.generated += 1
        self._private += 1
        if sequence.first_at is None:
            sequence.first_at = now
            out.append(("first", sequence, now))
        left = sequence.output_tokens - sequence.generated
        if left <= 0:
            self._end(sequence)
            out.append(("finish", sequence, now))
            return
        sequence.state = "decode"
        sequence.start_step = self._step - sequence.generated
        sequence.finish_step = self._step + left
        self._decoding += 1
        self._context += sequence.prompt_tokens + sequence.generated
        heapq.heappush(self._finish, (sequence.finish_step, sequence.serial, sequence))

    def _leave_decode(self, sequence: SimSequence) -> None:
        sequence.generated = self._step - sequence.start_step
        self._decoding -= 1
        self._context -= sequence.prompt_tokens + sequence.generated

    def _end(self, sequence: SimSequence) -> None:
        sequence.state = "gone"
        del self.sequences[sequence.request_id, sequence.attempt]
        self._free(sequence)

    def _free(self, sequence: SimSequence) -> None:
        if self.constants.prefix_cache and sequence.blocks:
            self.cache.release(sequence.blocks)
        self._private -= sequence.held + sequence.generated
        sequence.held = 0

    # -- the batch -------------------------------------------------------------------------------------------------

    def _blocks_used(self) -> int:
        # Half a block of each running sequence is empty on average.
        running = self._decoding + len(self._prefilling)
        cache = self.cache
        return len(cache.refs) - len(cache.idle) + ceil(self._private / self.constants.block_size + 0.5 * running)

    def _admit(self) -> None:
        constants = self.constants
        while self._waiting and self._decoding + len(self._prefilling) < constants.max_sequences:
            sequence = self._waiting[0]
            total = sequence.prompt_tokens + sequence.generated
            hit = self.cache.match(sequence.blocks) if constants.prefix_cache else 0
            named = len(sequence.blocks) if constants.prefix_cache else 0
            private = total - named * constants.block_size
            need = named - hit + ceil(max(private, 1) / constants.block_size)
            running = self._decoding + len(self._prefilling)
            if running and self._blocks_used() + need > constants.n_blocks:
                return
            self._waiting.popleft()
            if constants.prefix_cache and sequence.blocks:
                self.cache.acquire(sequence.blocks)
            sequence.cached = min(max(hit * constants.block_size, sequence.handed), total - 1)
            sequence.done_prefill = 0
            sequence.held = sequence.prompt_tokens - named * constants.block_size
            self._private += sequence.held + sequence.generated
            sequence.state = "prefill"
            self._prefilling.append(sequence)
            self._make_space()

    def _make_space(self) -> None:
        excess = self._blocks_used() + len(self.cache.idle) - self.constants.n_blocks
        if excess > 0:
            self.cache.evict(excess)

    def _preempt(self) -> None:
        """Memory is full of running sequences: the youngest decoding one starts over later."""
        victim = max((s for s in self.sequences.values() if s.state == "decode"), key=lambda s: s.serial, default=None)
        if victim is None:
            return
        self._leave_decode(victim)
        self._free(victim)
        victim.state = "waiting"
        victim.finish_step = 1 << 62
        self._waiting.appendleft(victim)
        self.preemptions += 1

    def _plan(self, now: float) -> None:
        """Choose the next run of equal steps."""
        constants = self.constants
        self._make_space()
        while self._decoding > 1 and self._blocks_used() > constants.n_blocks:
            self._preempt()
        if self._waiting:
            self._admit()
        self.version += 1
        if not self._prefilling and not self._decoding:
            self.next_at = float("inf")
            return
        steps = 1 << 30
        self._run_shares = shares = self._shares() if self._prefilling else {}
        for sequence, tokens in shares.items():
            steps = min(steps, sequence.uncomputed // tokens)
        if self._decoding:
            finish = self._finish
            while finish[0][2].state != "decode" or finish[0][2].finish_step != finish[0][0]:
                heapq.heappop(finish)
            steps = min(steps, finish[0][0] - self._step)
            free = (constants.n_blocks - self._blocks_used()) * constants.block_size
            steps = max(1, min(steps, free // self._decoding)) if free > 0 else 1
        self._run_a = (
            constants.step_s
            + constants.per_sequence_s * (self._decoding + len(shares))
            + constants.per_token_s * self._context
            + sum(shares.values()) / constants.prefill_tps
        )
        self._run_c = constants.per_token_s * self._decoding
        self._run_start = now
        self._run_steps = steps
        self.next_at = now + self._run_time(steps)

    def _shares(self) -> dict[SimSequence, int]:
        """Prefill tokens of the next step, by sequence. While nobody ends, joins or leaves, the steps after it have the same."""
        constants = self.constants
        room = max(constants.step_tokens - self._decoding, 1)
        queue: Iterable[SimSequence] = self._prefilling
        shares: dict[SimSequence, int] = {}
        if constants.oldest_share < 1.0 and len(self._prefilling) > 1:
            queue = sorted(self._prefilling, key=lambda s: (s.uncomputed, s.serial))
            oldest = self._prefilling[0]
            if queue[0] is not oldest:
                shares[oldest] = min(max(int(room * constants.oldest_share), 1), oldest.uncomputed)
                room -= shares[oldest]
        for sequence in queue:
            if room == 0:
                break
            had = shares.get(sequence, 0)
            more = min(sequence.uncomputed - had, room)
            shares[sequence] = had + more
            room -= more
        return shares
