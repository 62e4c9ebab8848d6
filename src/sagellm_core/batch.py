"""From a schedule to the device's batch, and from the device's result back to draws and scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sagellm_backend.base import RowSampling, StepBatch, StepResult
from sagellm_core.request import Constraint, GrammarCompiler, PendingMasks, SequenceState
from sagellm_core.scheduler import Work
from sagellm_protocol.generation import TokenLogprob
from sagellm_protocol.sampling import SamplingParams

__all__ = ["Draw", "adapter_numbers", "build_batch", "build_followers", "draw_counts", "penalised", "read_result"]


@dataclass(frozen=True, slots=True)
class Draw:
    """What one logit row gave; `scored` rows are of the prompt and draw nothing."""

    token_id: int
    logprob: TokenLogprob | None
    scored: bool


def build_batch(works: Sequence[Work], grammars: GrammarCompiler | None) -> StepBatch:
    """Return the rows of `works`, one sequence after another: its tokens, then the guessed ones.

    Masks are being written by `grammars` meanwhile; a draft that leaves its grammar is cut there.
    """
    token_ids: list[int] = []
    logit_rows: list[int] = []
    sampling: list[RowSampling] = []
    masks = _begin_masks(works, grammars)
    mask = iter(()) if masks is None else iter(masks.rows)
    for work in works:
        first = len(token_ids)
        token_ids += work.seq.tokens[work.start : work.start + work.n_rows]
        token_ids += work.draft
        for row, how in _rows(work, mask):
            logit_rows.append(first + row)
            sampling.append(how)
    return StepBatch(
        token_ids=np.array(token_ids, np.int32),
        starts=np.array([work.start for work in works], np.int32),
        lengths=np.array([work.n_rows + len(work.draft) for work in works], np.int32),
        block_tables=_tables(works),
        logit_rows=np.array(logit_rows, np.int32),
        sampling=sampling,
        adapters=adapter_numbers([work.seq for work in works]),
        masks_ready=None if masks is None else masks.wait,
    )


def build_followers(works: Sequence[Work], rows: Sequence[int]) -> StepBatch:
    """Return one row for each work, whose token is what logit row ``rows[i]`` of the step before draws (`LaunchRunner`)."""
    return StepBatch(
        token_ids=-1 - np.array(rows, np.int32),
        starts=np.array([work.start for work in works], np.int32),
        lengths=np.ones(len(works), np.int32),
        block_tables=_tables(works),
        logit_rows=np.arange(len(works), dtype=np.int32),
        sampling=[_sampling(work.seq, [0], None) for work in works],  # the unknown token counts, its value does not
        adapters=adapter_numbers([work.seq for work in works]),
    )


def draw_counts(works: Sequence[Work]) -> list[int]:
    """Return how many logit rows each work has."""
    return [work.n_scored + (1 + len(work.draft)) * work.draws for work in works]


def adapter_numbers(seqs: Sequence[SequenceState]) -> npt.NDArray[np.int32] | None:
    """Return `StepBatch.adapters`: None where no sequence uses one."""
    numbers = np.array([seq.adapter for seq in seqs], np.int32)
    return numbers if (numbers >= 0).any() else None


def read_result(
    works: Sequence[Work], batch: StepBatch, result: StepResult, counts: Sequence[int] | None = None
) -> Iterator[tuple[Work, list[Draw]]]:
    """Yield each work with what its logit rows gave, in order; `counts` are those of before the sequences changed."""
    ids, logprobs = result.token_ids.tolist(), result.logprobs.tolist()
    cursor = 0
    for work, n in zip(works, draw_counts(works) if counts is None else counts, strict=True):
        draws = []
        for index in range(cursor, cursor + n):
            how = batch.sampling[index]
            logprob = _logprob(result, index, ids[index], logprobs[index], how.logprobs)
            draws.append(Draw(ids[index], logprob, how.target >= 0))
        cursor += n
        yield work, draws


def _tables(works: Sequence[Work]) -> npt.NDArray[np.int32]:
    width = max(len(work.seq.blocks) for work in works)
    tables = np.full((len(works), width), -1, np.int32)
    for index, work in enumerate(works):
        tables[index, : len(work.seq.blocks)] = work.seq.blocks
    return tables


def _rows(work: Work, masks: Iterator[Any]) -> Iterator[tuple[int, RowSampling]]:
    seq, params = work.seq, work.seq.sampling
    if work.n_scored:
        first = max(work.start, len(seq.prompt_logprobs or ()) - 1)
        for position in range(first, first + work.n_scored):
            how = RowSampling(params, logprobs=params.prompt_logprobs or 0, target=seq.tokens[position + 1])
            yield position - work.start, how
    if work.draws:
        for ahead in range(1 + len(work.draft)):
            mask = None if seq.constraint is None else next(masks)
            yield work.n_rows - 1 + ahead, _sampling(seq, work.draft[:ahead], mask)


def _sampling(seq: SequenceState, ahead: list[int], mask: Any) -> RowSampling:
    params = seq.sampling
    needs_history = penalised(params)
    return RowSampling(
        params,
        seed=params.seed or 0,
        position=seq.n_output + len(ahead),
        history=[*seq.tokens, *ahead] if needs_history else (),
        n_prompt=seq.n_prompt if needs_history else 0,
        mask=mask,
        banned=_banned(seq, ahead),
        logprobs=-1 if params.logprobs is None else params.logprobs,
    )


def penalised(params: SamplingParams) -> bool:
    """Whether a draw depends on the tokens before it other than through the model."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _banned(seq: SequenceState, ahead: list[int]) -> tuple[int, ...]:
    """Ids that must not come next: the end before min_tokens, the last token of a bad word."""
    out: tuple[int, ...] = ()
    if seq.n_output + len(ahead) < seq.sampling.min_tokens:
        out = seq.request.eos_token_ids + seq.sampling.stop_token_ids
    if seq.request.bad_token_ids:
        tail = [*seq.tokens[seq.n_prompt :], *ahead]
        out += tuple(bad[-1] for bad in seq.request.bad_token_ids if _ends_with(tail, bad[:-1]))
    return out


def _ends_with(tokens: list[int], tail: tuple[int, ...]) -> bool:
    return not tail or tuple(tokens[-len(tail) :]) == tail


def _begin_masks(works: Sequence[Work], grammars: GrammarCompiler | None) -> PendingMasks | None:
    """Begin to write the masks of the rows that draw under a grammar, in order; None if there are none."""
    asked: list[tuple[Constraint, list[int]]] = []
    for work in works:
        seq, constraint = work.seq, work.seq.constraint
        if constraint is None or not work.draws:
            continue
        for token in seq.tokens[seq.n_prompt + seq.constrained :]:  # an earlier engine emitted it
            constraint.accept(token)
            seq.constrained += 1
        del work.draft[constraint.allowed(work.draft) :]
        asked.append((constraint, work.draft))
    return grammars.masks(asked) if grammars is not None and asked else None


def _logprob(result: StepResult, index: int, token_id: int, logprob: float, n_top: int) -> TokenLogprob | None:
    if n_top < 0:
        return None
    top = tuple(
        TokenLogprob(token_id=int(t), logprob=float(p))
        for t, p in zip(result.top_ids[index, :n_top], result.top_logprobs[index, :n_top], strict=True)
        if t >= 0
    )
    return TokenLogprob(token_id=token_id, logprob=logprob, top=top)
