"""The step loop with the device one step ahead: while the engine deals with the tokens of a step, the next one runs.

A step can be launched before the one before it is known if it is certain who takes part: one row of each running sequence, whose
token is taken from the device's own memory. Who has ended meanwhile by a stop token has computed one row for nothing. Whenever
something else could happen (a new sequence, a prompt, a grammar, a penalty that looks at the last token, a deadline), the step
before is awaited first, as in the plain loop of `Engine`, which is the oracle: the tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import cast

from sagellm_backend.base import Runner, SequenceFailure, StepBatch
from sagellm_backend.overlap import LaunchRunner, Pending
from sagellm_core.batch import build_batch, build_followers, draw_counts, penalised, read_result
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.request import GrammarCompiler, Phase, SequenceState
from sagellm_core.scheduler import Work
from sagellm_core.spill import DiskTier
from sagellm_protocol.engine import TokenDelta

__all__ = ["OverlapEngine"]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step on its way."""

    works: list[Work]
    counts: list[int]
    batch: StepBatch
    pending: Pending
    started: float


class OverlapEngine(Engine):
    """An `Engine` over a runner that is also a `LaunchRunner`; it does not guess tokens ahead.

    Attributes:
        followed: steps that were launched before the one before them was known.
    """

    def __init__(
        self,
        runner: Runner,
        settings: EngineSettings,
        *,
        clock: Callable[[], float] = monotonic,
        grammars: GrammarCompiler | None = None,
        spill: DiskTier | None = None,
    ) -> None:
        assert isinstance(runner, LaunchRunner), "the runner cannot launch"
        super().__init__(runner, settings, clock=clock, grammars=grammars, spill=spill)
        self.followed = 0
        self._flight: _Flight | None = None
        self._landed_at = float("-inf")

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return self._flight is not None or super().has_work

    @property
    def stalled(self) -> bool:
        """Whether all that is here waits for its grammar."""
        return self._flight is None and super().stalled

    def step(self) -> list[TokenDelta]:
        """Launch the next step if it is certain, take over the one on its way, and return what each sequence gained."""
        self._poll_grammars()
        flight, self._flight = self._flight, None
        ahead = None if flight is None else self._follow(flight)
        if flight is not None:
            self._land(flight)
        self._flight = ahead if ahead is not None else self._launch_schedule()
        self._pool()
        return self._emit()

    # --------------------------------------------------------------- private

    def _follow(self, flight: _Flight) -> _Flight | None:
        """Launch the step after `flight`, or return None where it is not certain."""
        works, rows, row = [], [], 0
        for work, count in zip(flight.works, flight.counts, strict=True):
            row += count
            if work.seq.phase is Phase.RUNNING and work.draws and len(work.seq.tokens) + 1 < work.seq.max_length:
                works.append(Work(work.seq, len(work.seq.tokens), 1))
                rows.append(row - 1)
        if not works or not self._certain(flight.works):
            return None
        if not all(self._kv.grow(work.seq, work.start + 1) for work in works):
            return None
        ahead = self._launch(works, build_followers(works, rows), [1] * len(works), flight.pending)
        self.followed += ahead is not None
        return ahead

    def _certain(self, works: Sequence[Work]) -> bool:
        """Whether the next step is one row of each running sequence that does not end by its length."""
        if self._pooler.has_work or not self._scheduler.steady(self._clock()):
            return False
        drawing = {id(work.seq) for work in works if work.draws}
        return all(id(seq) in drawing and _predictable(seq) for seq in self._scheduler.running)

    def _launch_schedule(self) -> _Flight | None:
        """Launch what the scheduler says."""
        works = list(self._schedule().work.values())
        if not works:
            return None
        batch = build_batch(works, self._grammars)
        return self._launch(works, batch, draw_counts(works), None)

    def _launch(self, works: list[Work], batch: StepBatch, counts: list[int], after: Pending | None) -> _Flight | None:
        started = self._clock()
        try:
            pending = cast(LaunchRunner, self._runner).launch(batch, after)
        except Exception as error:  # noqa: BLE001  the border to the device: whatever it raises must reach the requests
            self._on_device_error(works, error)
            return None
        finally:  # as in `Engine._forward`
            if batch.masks_ready is not None:
                batch.masks_ready()
        return _Flight(works, counts, batch, pending, started)

    def _land(self, flight: _Flight) -> None:
        """Wait for a step and take over what it gave to the sequences that are still here."""
        try:
            result = flight.pending.result()
        except Exception as error:  # noqa: BLE001  as in `_launch`
            self._on_device_error([work for work in flight.works if work.seq.phase is Phase.RUNNING], error)
            return
        self._failures = 0
        now = self._clock()
        self.metrics.on_step(flight.batch.token_ids.size, now - max(flight.started, self._landed_at))
        self._landed_at = now
        for work, draws in read_result(flight.works, flight.batch, result, flight.counts):
            if work.seq.phase is Phase.RUNNING:
                self._update(work, draws)

    def _on_device_error(self, works: list[Work], error: Exception) -> None:
        if isinstance(error, SequenceFailure):
            self._fail(works[error.index].seq, error.error)
        else:
            self._on_failure(works, error)


def _predictable(seq: SequenceState) -> bool:
    """Whether the next draw of `seq` needs nothing of the one before but its token on the device."""
    return seq.constraint is None and not seq.request.bad_token_ids and not penalised(seq.sampling) and seq.scored
