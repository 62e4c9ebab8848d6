"""Which sequences get which rows of the next step. Pure: no tensor library, no clock, no thread.

One token budget serves decode and prefill alike. Decoding sequences come first, one row each (and guessed ones while there is
room); waiting sequences start in the order of their urgency while their blocks fit; what is left of the budget goes to chunks
of prompts. Blocks are taken before the step; when they lack, the least urgent running sequence gives its blocks back and is
computed again later.
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass, field

from sagellm_core.kv_cache import KVCache, Match
from sagellm_core.request import Phase, SequenceState

__all__ = ["Schedule", "Scheduler", "SchedulerLimits", "Work"]

_TIDY_AT = 64


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step.

    Attributes:
        max_rows: the token budget.
        max_logit_rows: rows whose next token can be drawn.
        max_running: sequences that hold blocks.
    """

    max_rows: int
    max_logit_rows: int
    max_running: int


@dataclass(slots=True)
class Work:
    """Rows of one sequence: tokens ``start … start + n_rows - 1``, then up to `n_draft` guessed ones."""

    seq: SequenceState
    start: int
    n_rows: int
    n_draft: int = 0
    draft: list[int] = field(default_factory=list)

    @property
    def draws(self) -> bool:
        """Whether the sequence's next token can be drawn after these rows."""
        return self.start + self.n_rows == len(self.seq.tokens)

    @property
    def n_scored(self) -> int:
        """Rows from which log-probabilities of prompt tokens are taken; those of before a preemption are not taken again."""
        scores = self.seq.prompt_logprobs
        if scores is None:
            return 0
        return max(0, min(self.start + self.n_rows, self.seq.n_prompt - 1) - max(self.start, len(scores) - 1))

    @property
    def logit_rows(self) -> int:
        """Rows that need logits."""
        return self.n_scored + (1 + self.n_draft) * self.draws


@dataclass(slots=True)
class Schedule:
    """One step: the work by arrival number, and what ended or was pushed back while it was laid out."""

    rows_left: int
    logits_left: int
    work: dict[int, Work] = field(default_factory=dict)
    expired: list[SequenceState] = field(default_factory=list)
    preempted: int = 0

    def add(self, work: Work) -> None:
        """Take `work` in."""
        self.rows_left -= work.n_rows + work.n_draft
        self.logits_left -= work.logit_rows
        self.work[work.seq.arrival] = work

    def remove(self, seq: SequenceState) -> None:
        """Take the work of `seq` out again, if there is any."""
        work = self.work.pop(seq.arrival, None)
        if work is not None:
            self.rows_left += work.n_rows + work.n_draft
            self.logits_left += work.logit_rows


class Scheduler:
    """Waiting and running sequences of one engine.

    The sequence with the least `urgency` always gets on: it is never pushed back, and what it needs is taken from others.
    Since urgency grows with the time of arrival, every sequence becomes that one.
    """

    def __init__(self, kv: KVCache, limits: SchedulerLimits) -> None:
        self.kv = kv
        self.limits = limits
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self.preemptions = 0
        self._deadlines: list[tuple[float, int, SequenceState]] = []
        self._deadlines_tidy_at = _TIDY_AT

    def add(self, seq: SequenceState) -> None:
        """Queue a sequence."""
        insort(self.waiting, seq, key=_urgency)
        if seq.deadline is not None:
            self._watch(seq, seq.deadline)

    def remove(self, seq: SequenceState) -> None:
        """Let go of a sequence and of its blocks, wherever it stands."""
        if seq.phase is Phase.WAITING:
            self.waiting.remove(seq)
        elif seq.phase is Phase.RUNNING:
            self.running.remove(seq)
        self.kv.release(seq)
        seq.phase = Phase.FINISHED

    def schedule(self, now: float) -> Schedule:
        """Return the next step; `now` is in seconds on the clock of the sequences' arrivals."""
        step = Schedule(rows_left=self.limits.max_rows, logits_left=self.limits.max_logit_rows)
        self._expire(step, now)
        self._decode(step)
        if not step.preempted:
            self._admit(step)
        self._prefill(step)
        return step

    def steady(self, now: float) -> bool:
        """Whether `schedule` would neither let a sequence in nor end one by its deadline."""
        if self._deadlines and self._deadlines[0][0] <= now:
            return False
        ready = next((seq for seq in self.waiting if not seq.blocked), None)
        if ready is None:
            return True
        full = len(self.running) >= self.limits.max_running
        return full and self.running[-1].request.priority <= ready.request.priority

    def advance(self, seq: SequenceState, n_computed: int) -> None:
        """Note that the cache now holds `n_computed` more tokens of `seq`."""
        before = seq.computed
        seq.computed += n_computed
        self.kv.publish(seq, before)

    # --------------------------------------------------------------- private

    def _watch(self, seq: SequenceState, deadline: float) -> None:
        """Note a deadline, and let go of ended sequences now and then: theirs may be an hour away, their tokens need not stay."""
        heapq.heappush(self._deadlines, (deadline, seq.arrival, seq))
        if len(self._deadlines) >= self._deadlines_tidy_at:
            self._deadlines = [entry for entry in self._deadlines if entry[2].phase is not Phase.FINISHED]
            heapq.heapify(self._deadlines)
            self._deadlines_tidy_at = max(_TIDY_AT, 2 * len(self._deadlines))

    def _expire(self, step: Schedule, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heapq.heappop(self._deadlines)[2]
            if seq.phase is not Phase.FINISHED:
                self.remove(seq)
                step.expired.append(seq)

    def _decode(self, step: Schedule) -> None:
        for seq in [s for s in self.running if s.decoding]:
            if seq.phase is not Phase.RUNNING or not self._make_room(seq, seq.computed + 1, step):
                continue
            step.add(Work(seq, seq.computed, 1))
        self._guess(step)

    def _guess(self, step: Schedule) -> None:
        """Add guessed rows where row budget and free blocks allow; nobody is pushed back for a guess."""
        prompts = sum(not seq.decoding for seq in self.running)
        spare_rows = step.rows_left - max(prompts, self.limits.max_rows // 4)
        spare_logits = step.logits_left - prompts - 1
        for work in list(step.work.values()):
            seq = work.seq
            room = seq.max_length - len(seq.tokens) - 1
            n = min(seq.want_draft, room, spare_rows, spare_logits)
            if n > 0 and self.kv.grow(seq, seq.computed + 1 + n):
                step.remove(seq)
                step.add(Work(seq, seq.computed, 1, n))
                spare_rows -= n
                spare_logits -= n

    def _prefill(self, step: Schedule) -> None:
        """Give the most urgent prompt a quarter of what is left, then the shortest first: long prompts do not hold up short ones."""
        prompts = [seq for seq in self.running if not seq.decoding]
        if not prompts:
            return
        self._chunk(prompts[0], step, max(1, step.rows_left // 4) if len(prompts) > 1 else step.rows_left)
        for seq in sorted(prompts, key=lambda s: (s.request.priority, s.uncomputed, s.urgency)):
            if seq.phase is Phase.RUNNING:
                self._chunk(seq, step, step.rows_left)

    def _chunk(self, seq: SequenceState, step: Schedule, most: int) -> None:
        before = step.work.get(seq.arrival)
        start, taken = (seq.computed, before.n_rows) if before else (seq.computed, 0)
        step.remove(seq)
        work = Work(seq, start, min(seq.uncomputed, taken + most))
        work.n_rows = self._within_logits(work, step.logits_left)
        if work.n_rows > 0 and self._make_room(seq, start + work.n_rows, step):
            step.add(work)

    def _within_logits(self, work: Work, logits_left: int) -> int:
        return work.n_rows - max(0, work.logit_rows - logits_left)

    def _make_room(self, seq: SequenceState, n_tokens: int, step: Schedule) -> bool:
        while not self.kv.grow(seq, n_tokens):
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is seq:
                return False
        return True

    def _preempt(self, victim: SequenceState, step: Schedule) -> None:
        step.remove(victim)
        self.running.remove(victim)
        self.kv.release(victim)
        victim.phase = Phase.WAITING
        victim.preemptions += 1
        self.preemptions += 1
        step.preempted += 1
        insort(self.waiting, victim, key=_urgency)

    def _admit(self, step: Schedule) -> None:
        deferred = 0
        for seq in list(self.waiting):
            if seq.blocked:
                continue
            found = self._room_for(seq, step)
            if found is None or deferred > self.limits.max_running:
                return
            if found.promised:  # another sequence is computing what this one would: it is cheaper to wait
                deferred += 1
            else:
                self._start(seq, found)

    def _room_for(self, seq: SequenceState, step: Schedule) -> Match | None:
        """Return what the cache holds of `seq` if it can start now; sequences of a lower band are pushed back for it."""
        while True:
            if len(self.running) < self.limits.max_running:
                found = self.kv.match(seq)
                if found.promised or self._fits(seq, found):
                    return found
            victim = self.running[-1] if self.running else seq
            if victim.request.priority <= seq.request.priority or victim.urgency <= seq.urgency:
                return None
            self._preempt(victim, step)

    def _fits(self, seq: SequenceState, found: Match) -> bool:
        """Whether the whole sequence, what running prompts still need and a block for each running sequence fit."""
        idle = self.kv.idle(found.resident)
        need = self.kv.blocks_for(len(seq.tokens) + 1) - len(found.resident) + idle
        if not self.running:
            return need <= self.kv.n_available
        promised = sum(max(0, self.kv.blocks_for(len(s.tokens)) - len(s.blocks)) for s in self.running)
        return need + promised + len(self.running) <= self.kv.n_available

    def _start(self, seq: SequenceState, found: Match) -> None:
        self.waiting.remove(seq)
        self.kv.attach(seq, found)
        seq.phase = Phase.RUNNING
        insort(self.running, seq, key=_urgency)


def _urgency(seq: SequenceState) -> tuple[float, int]:
    return seq.urgency
