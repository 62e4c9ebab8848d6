"""Guessing tokens ahead, to be verified in one step.

Verification is by sample and match: the draw of position p is a function of the seed, of p and of the tokens before p, so each
row of a guess is drawn as if it came alone, and guesses are kept while they equal what was drawn. The output is the same as
without guessing, greedy or sampled; only the number of steps differs. (Exactness is the aim of Leviathan et al., 2023; the
lookup is that of prompt lookup decoding, Saxena, 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sagellm_backend.base import RowSampling, Runner, StepBatch
from sagellm_core.request import SequenceState
from sagellm_core.scheduler import Work
from sagellm_protocol.sampling import SamplingParams

__all__ = ["DraftSpeculator", "NgramSpeculator", "Speculator"]

_GREEDY = SamplingParams(temperature=0.0)
_LEARN = 0.3
_PRIOR = 0.5
_PROBE = 16
_ROW_COST = 0.1
"""Measured on the native backend: four rows of one sequence take 1.15 times as long as one, nine rows twice as long."""
_DRAFT_COST = 0.25
"""A draft model that is not at least four times faster is not worth asking."""


class Speculator(Protocol):
    """Guesses; called from the step loop only."""

    def plan(self, running: Sequence[SequenceState]) -> None:
        """Set `want_draft` of each sequence before rows are handed out."""
        ...

    def propose(self, works: Sequence[Work]) -> None:
        """Fill `draft` of each work with at most `n_draft` tokens."""
        ...

    def follow(self, works: Sequence[Work]) -> None:
        """See what the model is about to run."""
        ...

    def observe(self, work: Work, accepted: int) -> None:
        """Learn how many guesses held."""
        ...

    def copy_block(self, source: int, destination: int) -> None:
        """Copy a KV block of the guesser's own, if it has any."""
        ...

    def forget(self, seq: SequenceState) -> None:
        """Drop what is kept for a sequence that ended."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...


@dataclass(slots=True)
class _Record:
    """How often the guesses for one sequence held lately, by kind of guess.

    A rate is the probability that the next guessed token holds, given that those before it did.
    """

    rates: dict[int, float]
    kind: int = 0
    idle: int = 0

    def learn(self, guessed: int, accepted: int) -> None:
        """Guesses after the first that failed were never tried."""
        tried = accepted + (accepted < guessed)
        self.rates[self.kind] += _LEARN * (accepted / tried - self.rates[self.kind])


def best_length(rate: float, cost: float, most: int) -> int:
    """Return the number of guessed rows that gives most tokens for the time.

    Args:
        rate: probability that a guess holds, given that those before it did.
        cost: of one more row, as a share of the sequence's own step.
        most: upper bound.
    """
    best, best_gain, tokens = 0, 1.0, 1.0
    for length in range(1, most + 1):
        tokens += rate**length
        gain = tokens / (1.0 + cost * length)
        if gain > best_gain:
            best, best_gain = length, gain
    return best


class _Lengths:
    """How far ahead to guess for each sequence.

    Args:
        most: upper bound.
        kinds: kinds of guesses, each with a rate of its own.
        row_cost: of one more row, as a share of a step with a single row.
        guess_cost: of guessing one token, as a share of the same.
    """

    def __init__(self, most: int, kinds: Sequence[int], row_cost: float, guess_cost: float = 0.0) -> None:
        self._most = most
        self._kinds = kinds
        self._row_cost = row_cost
        self._guess_cost = guess_cost
        self._cost = row_cost + guess_cost
        self._of: dict[int, _Record] = {}

    def plan(self, running: Sequence[SequenceState]) -> None:
        """Ask for the rows of the most promising kind; `limit` gives back what the kind at hand does not deserve."""
        decoding = [seq for seq in running if seq.decoding]
        # The fuller the batch, the less of a step is shared by its rows: one more row costs nearly what a token costs.
        shared = 1.0 + (len(decoding) - 1) * self._row_cost
        self._cost = len(decoding) * self._row_cost / shared + self._guess_cost
        for seq in decoding:
            record = self._of.setdefault(seq.arrival, _Record(dict.fromkeys(self._kinds, _PRIOR)))
            seq.want_draft = max(1, best_length(max(record.rates.values()), self._cost, self._most))

    def limit(self, work: Work, kind: int) -> int:
        """Return how many of the work's rows a guess of this kind is worth."""
        record = self._of[work.seq.arrival]
        record.kind = kind
        length = best_length(record.rates[kind], self._cost, self._most)
        if not length:
            record.idle += 1
            length = int(record.idle % _PROBE == 0)  # the text may have become predictable
        return min(length, work.n_draft)

    def learn(self, work: Work, accepted: int) -> None:
        self._of[work.seq.arrival].learn(len(work.draft), accepted)

    def forget(self, seq: SequenceState) -> None:
        self._of.pop(seq.arrival, None)


@dataclass(slots=True)
class _Index:
    """Where each n-gram of a sequence was last followed by something."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    done: int = 0


class NgramSpeculator:
    """Looks the newest tokens up in prompt and output, and guesses that what followed them follows again.

    Args:
        max_draft: most tokens guessed at once.
        longest, shortest: lengths of the tails that are looked up, longest first.
    """

    def __init__(self, max_draft: int, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._lengths = _Lengths(max_draft, self._sizes, _ROW_COST)
        self._indexes: dict[int, _Index] = {}

    def plan(self, running: Sequence[SequenceState]) -> None:
        """Set `want_draft` of each sequence."""
        self._lengths.plan(running)

    def propose(self, works: Sequence[Work]) -> None:
        """Fill `draft` where the tail of a sequence occurred before."""
        for work in works:
            index = self._indexes.setdefault(work.seq.arrival, _Index())
            tokens = work.seq.tokens
            size, start = self._lookup(index, tokens)
            if size:
                period = len(tokens) - start  # past the end the guess goes on in itself: a loop continues
                n = self._lengths.limit(work, size)
                work.draft = [tokens[start + ahead % period] for ahead in range(n)]

    def _lookup(self, index: _Index, tokens: list[int]) -> tuple[int, int]:
        """Return the size of the longest tail that occurred before, and what position followed it; 0 if none did."""
        for end in range(index.done, len(tokens)):  # tokens[end] follows the n-grams that end before it
            for size in self._sizes:
                if size <= end:
                    index.after[tuple(tokens[end - size : end])] = end
        index.done = len(tokens)
        for size in self._sizes:
            start = index.after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if start is not None:
                return size, start
        return 0, 0

    def follow(self, works: Sequence[Work]) -> None:
        """Nothing: there is no model."""

    def observe(self, work: Work, accepted: int) -> None:
        """Learn how many guesses held."""
        self._lengths.learn(work, accepted)

    def copy_block(self, source: int, destination: int) -> None:
        """Nothing: there are no blocks."""

    def forget(self, seq: SequenceState) -> None:
        """Drop the index of a sequence."""
        self._lengths.forget(seq)
        self._indexes.pop(seq.arrival, None)

    def close(self) -> None:
        """Drop all indexes."""
        self._indexes.clear()


class DraftSpeculator:
    """Asks a smaller model of the same vocabulary.

    Its KV cache has the same block numbers as the model's, so prefix hits, copies and preemption hold for both. Blocks that
    come back from the disk tier are not restored here: guesses over them may be worse, never the output.

    Args:
        runner: the draft model, with as many blocks as the model, and room for a row more a sequence; closed with the speculator.
        max_draft: most tokens guessed at once.
    """

    def __init__(self, runner: Runner, max_draft: int) -> None:
        self._runner = runner
        self._lengths = _Lengths(max_draft, (0,), _ROW_COST, _DRAFT_COST)
        self._seen: dict[int, int] = {}

    def plan(self, running: Sequence[SequenceState]) -> None:
        """Set `want_draft` of each sequence."""
        self._lengths.plan(running)

    def propose(self, works: Sequence[Work]) -> None:
        """Decode ahead with the draft model, all sequences together, one token a round."""
        for work in works:
            work.n_draft = self._lengths.limit(work, 0)
        rows = [
            _Rows(work, begin := self._begin(work), work.seq.tokens[begin : work.start + 1])
            for work in works
            if work.n_draft
        ]
        while rows:
            ids = self._runner.step(_batch(rows, draw=True)).token_ids.tolist()
            for row, token_id in zip(rows, ids, strict=True):
                self._seen[row.work.seq.arrival] = row.begin + len(row.tokens)
                if token_id >= 0:
                    row.work.draft.append(token_id)
                else:
                    row.work.n_draft = len(row.work.draft)
            works = [row.work for row in rows if len(row.work.draft) < row.work.n_draft]
            rows = [_Rows(work, work.start + len(work.draft), [work.draft[-1]]) for work in works]

    def follow(self, works: Sequence[Work]) -> None:
        """Run prompts, and tokens for which nothing was guessed, through the draft model too."""
        rows = [
            _Rows(work, begin := self._begin(work), work.seq.tokens[begin : work.start + work.n_rows])
            for work in works
            if not work.draft
        ]
        if rows:
            self._runner.step(_batch(rows, draw=False))
        for row in rows:
            self._seen[row.work.seq.arrival] = row.begin + len(row.tokens)

    def observe(self, work: Work, accepted: int) -> None:
        """Learn how many guesses held; the cache of the draft model is right up to there."""
        self._lengths.learn(work, accepted)
        arrival = work.seq.arrival
        self._seen[arrival] = min(self._seen[arrival], work.start + 1 + accepted)

    def copy_block(self, source: int, destination: int) -> None:
        """Copy a block of the draft model's cache."""
        self._runner.kv.copy_blocks([(source, destination)])

    def forget(self, seq: SequenceState) -> None:
        """Drop what is known of a sequence."""
        self._lengths.forget(seq)
        self._seen.pop(seq.arrival, None)

    def close(self) -> None:
        """Close the draft model."""
        self._runner.close()

    def _begin(self, work: Work) -> int:
        """The first position that the draft model has not seen: the last guess, if all guesses of a step held."""
        return min(self._seen.get(work.seq.arrival, work.start), work.start)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokens of one sequence for the draft model, from position `begin`."""

    work: Work
    begin: int
    tokens: list[int]


def _batch(rows: Sequence[_Rows], *, draw: bool) -> StepBatch:
    tables = np.full((len(rows), max(len(row.work.seq.blocks) for row in rows)), -1, np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row.work.seq.blocks)] = row.work.seq.blocks
    lengths = np.array([len(row.tokens) for row in rows], np.int32)
    return StepBatch(
        token_ids=np.array([token for row in rows for token in row.tokens], np.int32),
        starts=np.array([row.begin for row in rows], np.int32),
        lengths=lengths,
        block_tables=tables,
        logit_rows=(np.cumsum(lengths) - 1).astype(np.int32) if draw else np.empty(0, np.int32),
        sampling=[RowSampling(_GREEDY)] * len(rows) if draw else (),
    )
