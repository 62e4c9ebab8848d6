"""Drawing tokens on the device: the same token as `sagellm_backend.sampling` for the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sagellm_backend.base import RowSampling
from sagellm_backend.cuda.ops import TorchOps
from sagellm_backend.cuda.plan import send
from sagellm_backend.cuda.sampling_plan import Edits, SamplingPlan, gather_masks
from sagellm_backend.cuda.weighted import draw_weighted, integer_weights
from sagellm_backend.sampling import sample

__all__ = ["Drawn", "draw", "process", "report"]

_SORTED_AT_ONCE = 1 << 23
"""Logits; each takes about a hundred bytes while its row is sorted and weighed."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """On the device: tokens int32 (n,), and where any row reports them log-probabilities f32 (n,), alternatives int32 and f32 (n, k)."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def draw(ops: TorchOps, logits: torch.Tensor, plan: SamplingPlan, rows: Sequence[RowSampling]) -> torch.Tensor:
    """Draw from f32 (n, vocab); int32 (n,), -1 where nothing can be drawn, the target where there is one."""
    z = process(ops, logits, plan, rows)
    device = z.device
    best, tokens = z.max(dim=1)
    if plan.scale.any():
        scale, words = send(plan.scale, device), send(plan.words, device)
        drawn = ops.draw_plain(z, best, scale, words)
        for part in _portions(plan.filtered, z.shape[1]):
            chosen = send(plan.filtered[part], device)
            weights = _filtered(z[chosen], best[chosen], scale[chosen], plan, part)
            drawn[chosen] = draw_weighted(weights, words[chosen])
        tokens = torch.where(scale > 0, drawn, tokens)
    tokens = torch.where(best > float("-inf"), tokens, -1)
    if (plan.targets >= 0).any():
        targets = send(plan.targets, device)
        tokens = torch.where(targets >= 0, targets, tokens)
    tokens = tokens.to(torch.int32)
    for i in plan.hosted:
        tokens[i] = sample(logits[i].cpu().numpy(), rows[i])
    return tokens


def _portions(rows: npt.NDArray[np.int64], vocab: int) -> Iterator[slice]:
    """Rows to sort together: so many that what they take stays far below a gigabyte."""
    size = max(1, _SORTED_AT_ONCE // vocab)
    return (slice(start, start + size) for start in range(0, rows.size, size))


def process(ops: TorchOps, logits: torch.Tensor, plan: SamplingPlan, rows: Sequence[RowSampling]) -> torch.Tensor:
    """Bias, masks and penalties on a copy; what is not finite or excluded is -inf."""
    z = logits.clone() if plan.edited else logits
    device, minus_inf = z.device, float("-inf")
    _apply(z, plan.bias, lambda old, value: old + value)
    if plan.masked.size:
        masks = send(gather_masks(plan, rows, z.shape[1]).view("<i4"), device)
        ops.apply_masks(z, send(plan.masked, device), masks)
    _apply(z, plan.banned, lambda old, _: torch.full_like(old, minus_inf))
    _apply(z, plan.repetition, lambda old, value: torch.where(old > 0, old / value, old * value))
    _apply(z, plan.frequency, lambda old, value: old - value)
    _apply(z, plan.presence, lambda old, value: old - value)
    return torch.nan_to_num(z, nan=minus_inf, posinf=minus_inf, neginf=minus_inf)


def _apply(z: torch.Tensor, edits: Edits, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    if not edits.size:
        return
    rows, tokens, values = (send(a, z.device) for a in (edits.rows, edits.tokens, edits.values))
    z[rows, tokens] = change(z[rows, tokens], values)


def _filtered(
    z: torch.Tensor, best: torch.Tensor, scale: torch.Tensor, plan: SamplingPlan, part: slice
) -> torch.Tensor:
    """Weights of a part of the filtered rows, 0 for what top_k, top_p and min_p leave out; int64 (rows, vocab)."""
    device = z.device
    top_k, top_p, min_p = (send(a[part], device)[:, None] for a in (plan.top_k, plan.top_p, plan.min_p))
    order = torch.sort(z, dim=1, descending=True, stable=True).indices
    w = torch.gather(integer_weights(z, best, scale), 1, order)
    rank = torch.arange(w.shape[1], device=device)
    w = torch.where(rank < top_k, w, 0)
    running = torch.cumsum(w, dim=1)
    reached = (running.double() < top_p * running[:, -1:].double()).sum(dim=1, keepdim=True)
    w = torch.where((top_p >= 1.0) | (rank <= reached), w, 0)
    w = torch.where(w.double() >= min_p * w[:, :1].double(), w, 0)
    return torch.zeros_like(w).scatter(1, order, w)


def report(logits: torch.Tensor, tokens: torch.Tensor, plan: SamplingPlan) -> Drawn:
    """Log-probabilities of the raw distribution for the rows that want them, NaN and -1 elsewhere."""
    if not plan.reported.size:
        return Drawn(tokens)
    n, device = tokens.numel(), logits.device
    k = int(plan.n_top.max(initial=0))
    logprobs = torch.full((n,), float("nan"), device=device)
    top_ids = torch.full((n, k), -1, dtype=torch.int32, device=device)
    top_logprobs = torch.full((n, k), float("nan"), device=device)
    rows = send(plan.reported, device)
    raw = logits[rows]
    raw = torch.where(torch.isfinite(raw), raw, float("-inf"))
    base = torch.logsumexp(raw.double(), dim=1, keepdim=True)
    picked = tokens[rows].long()
    own = torch.gather(raw.double(), 1, picked.clamp(min=0)[:, None]) - base
    logprobs[rows] = torch.where(picked >= 0, own[:, 0], float("nan")).float()
    if k:
        ids = likeliest(raw, k)
        values = (torch.gather(raw.double(), 1, ids) - base).float()
        wanted = torch.arange(k, device=device) < send(plan.n_top, device)[:, None]
        top_ids[rows] = torch.where(wanted, ids, -1).to(torch.int32)
        top_logprobs[rows] = torch.where(wanted, values, float("nan"))
    return Drawn(tokens, logprobs, top_ids, top_logprobs)


def likeliest(raw: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k greatest, ties by lower id: int64 (n, k). Value and id make one integer, so that no two are equal."""
    bits = (raw + 0.0).view(torch.int32).long()  # -0 becomes 0
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    ids = torch.arange(raw.shape[1], device=raw.device)
    keys = (ordered << 20) - ids
    return torch.topk(keys, k, dim=1).indices
