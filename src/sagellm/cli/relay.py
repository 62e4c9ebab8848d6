"""The supervisor's part in what workers tell each other: it passes questions on, and gathers the answers."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import msgspec

from sagellm_control_plane.live.follower import Answer, Answers, Ask, line

__all__ = ["Relay"]

_WAIT_S = 5.0
_METRICS = "metrics"
_UNDOES = ("unregister",)
"""Duties after which nothing is left to repeat of what was said under their name."""


@dataclass
class _Question:
    asker: int
    number: int
    what: str
    waiting: set[int]
    timer: asyncio.TimerHandle | None = None
    bodies: list[msgspec.Raw] = field(default_factory=list)


class Relay:
    """Questions under way between workers, which are known by their process ids.

    What lasts is repeated to workers that join later. Of a worker that has ended the last metrics are kept, so that sums over
    all workers never fall.
    """

    def __init__(self) -> None:
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._numbers = itertools.count()
        self._open: dict[int, _Question] = {}
        self._lasting: dict[str, Ask] = {}
        self._metrics: dict[int, msgspec.Raw] = {}
        self._gone: msgspec.Raw | None = None

    def join(self, worker: int, writer: asyncio.StreamWriter) -> None:
        """A worker takes part from now on: tell it what lasts."""
        self._writers[worker] = writer
        for ask in self._lasting.values():
            writer.write(line(ask))

    def leave(self, worker: int) -> None:
        """A worker has ended: nobody waits for it any more."""
        self._writers.pop(worker, None)
        last = self._metrics.pop(worker, None)
        if last is not None:
            self._gone = _counted(self._gone, last)
        for number in list(self._open):
            self._heard(number, worker)

    def forget(self, lasting: str) -> None:
        """Repeat this no more."""
        self._lasting.pop(lasting, None)

    def ask(self, asker: int, ask: Ask) -> None:
        """Pass a worker's question on to all others."""
        number = next(self._numbers)
        passed = msgspec.structs.replace(ask, number=number)
        if ask.what in _UNDOES:
            self.forget(ask.lasting)
        elif ask.lasting:
            self._lasting[ask.lasting] = passed
        # Metrics are asked of the asker too, although it has its own: they are kept for the day that it ends.
        waiting = set(self._writers) if ask.what == _METRICS else self._writers.keys() - {asker}
        question = _Question(asker, ask.number, ask.what, waiting)
        self._open[number] = question
        question.timer = asyncio.get_running_loop().call_later(_WAIT_S, self._close, number)
        for worker in waiting:
            self._writers[worker].write(line(passed))
        self._close_if_heard(number)

    def answer(self, worker: int, answer: Answer) -> None:
        """Take a worker's answer."""
        question = self._open.get(answer.number)
        if question is None:  # late, or to what was repeated to it when it joined
            return
        body = answer.body.copy()
        if question.what == _METRICS:
            self._metrics[worker] = body
        if worker != question.asker:
            question.bodies.append(body)
        self._heard(answer.number, worker)

    def _heard(self, number: int, worker: int) -> None:
        self._open[number].waiting.discard(worker)
        self._close_if_heard(number)

    def _close_if_heard(self, number: int) -> None:
        if not self._open[number].waiting:
            self._close(number)

    def _close(self, number: int) -> None:
        question = self._open.pop(number)
        if question.timer is not None:
            question.timer.cancel()
        bodies = question.bodies
        if question.what == _METRICS and self._gone is not None:
            bodies = [*bodies, self._gone]
        writer = self._writers.get(question.asker)
        if writer is not None:
            writer.write(line(Answers(number=question.number, bodies=bodies)))


def _counted(so_far: msgspec.Raw | None, last: msgspec.Raw) -> msgspec.Raw:
    """Return what processes that have ended counted, together."""
    from sagellm_gateway.metric_families import Family, merge

    several = [msgspec.json.decode(body, type=list[Family]) for body in (so_far, last) if body is not None]
    counted = [[family for family in families if family.kind != "gauge"] for families in several]
    return msgspec.Raw(msgspec.json.encode(merge(counted)))
