"""Token masks of one step, written on a thread of their own while the layers run: only the draw needs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["MaskFiller", "Masks"]

_HAND_OVER_S = 0.0003
"""Masks that take less are written at once. Measured with one stream on two cores: a hand-over costs 0.1 ms, its mask 0.05."""
_LEARN = 0.1

Asked = tuple["LLMatcher | None", Sequence[int]]


class Masks:
    """Masks that are being written.

    Attributes:
        rows: uint32[n, ceil(vocab / 32)], bit t % 32 of word t // 32; nothing is allowed in a row that is not written yet.
    """

    def __init__(self, rows: npt.NDArray[np.uint32], written: Future[None] | None) -> None:
        self.rows = rows
        self._written = written

    def wait(self) -> None:
        """Return when all rows are written; until then nobody may touch the matchers."""
        if self._written is not None:
            self._written.result()


class MaskFiller:
    """Writes the masks of a step by llguidance, which holds no interpreter lock meanwhile. One step at a time.

    One thread is enough: a mask takes a tenth of the time that the layers take for its row.
    """

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._mask_s = _HAND_OVER_S

    def begin(self, asked: Sequence[Asked]) -> Masks:
        """Begin to write, for each matcher, a mask for the next token and one after each token of a draft that it accepts.

        A matcher that is None, or beyond llguidance's limits, allows nothing. The matchers do not move.
        """
        rows = np.zeros((sum(1 + len(draft) for _, draft in asked), self._words), np.uint32)
        if len(rows) * self._mask_s >= _HAND_OVER_S:
            with suppress(RuntimeError):  # the interpreter is ending: its pools take no more work
                return Masks(rows, self._thread.submit(self._write, rows, asked))
        self._write(rows, asked)
        return Masks(rows, None)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._thread.shutdown(wait=True)

    def _write(self, rows: npt.NDArray[np.uint32], asked: Sequence[Asked]) -> None:
        began = time.perf_counter()
        left = rows
        for matcher, draft in asked:
            own, left = left[: 1 + len(draft)], left[1 + len(draft) :]
            if matcher is not None:
                _fill(own, matcher, draft)
        self._mask_s += _LEARN * ((time.perf_counter() - began) / len(rows) - self._mask_s)


def _fill(rows: npt.NDArray[np.uint32], matcher: LLMatcher, draft: Sequence[int]) -> None:
    from llguidance.numpy import fill_next_token_bitmask

    for row in range(len(rows)):
        if row:
            matcher.consume_token(draft[row - 1])
        fill_next_token_bitmask(matcher, rows.view(np.int32), row)
    if draft:
        matcher.rollback(len(draft))
    if matcher.is_error():
        rows[:] = 0
