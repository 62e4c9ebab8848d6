"""Token masks of one step, written on threads of their own while the layers run: only the draw needs them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

__all__ = ["MaskFiller", "Masks"]

_MOST_THREADS = 8

Asked = tuple["LLMatcher | None", Sequence[int]]


class Masks:
    """Masks that are being written.

    Attributes:
        rows: uint32[n, ceil(vocab / 32)], bit t % 32 of word t // 32; nothing is allowed in a row that is not written yet.
    """

    def __init__(self, rows: npt.NDArray[np.uint32], written: Future[None]) -> None:
        self.rows = rows
        self._written = written

    def wait(self) -> None:
        """Return when all rows are written; until then nobody may touch the matchers."""
        self._written.result()


class MaskFiller:
    """Writes the masks of a step by llguidance, which holds no interpreter lock meanwhile. Used by one thread at a time."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: LLExecutor | None = None

    def begin(self, asked: Sequence[Asked]) -> Masks:
        """Begin to write, for each matcher, a mask for the next token and one after each token of a draft that it accepts.

        A matcher that is None, or beyond llguidance's limits, allows nothing. The matchers do not move.
        """
        rows = np.zeros((sum(1 + len(draft) for _, draft in asked), self._words), np.uint32)
        return Masks(rows, self._thread.submit(self._write, rows, asked))

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._thread.shutdown(wait=True)
        self._executor = None

    def _write(self, rows: npt.NDArray[np.uint32], asked: Sequence[Asked]) -> None:
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

        if self._executor is None:
            self._executor = LLExecutor(max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2)))
        firsts = accumulate((1 + len(draft) for _, draft in asked), initial=0)
        live = [
            (matcher, first, list(draft))
            for first, (matcher, draft) in zip(firsts, asked, strict=False)
            if matcher is not None
        ]
        plain = [(matcher, first) for matcher, first, draft in live if not draft]
        guessed = [entry for entry in live if entry[2]]
        if plain:
            fill_next_token_bitmask_par(self._executor, plain, rows.view(np.int32))
        if guessed:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, guessed, rows.view(np.int32))
        for matcher, first, draft in live:
            if matcher.is_error():
                rows[first : first + 1 + len(draft)] = 0
