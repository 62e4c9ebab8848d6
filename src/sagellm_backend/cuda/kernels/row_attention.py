"""Attention of one new row a sequence, from its raw projections, in one launch.

That is norm and rotation of q and k, the write of k and v, the paged keys and values, and the joining of the parts. The keys before the row are divided among programs. The last of them also adds the row's own key, which it has in registers. Who
arrives last, by a counter, joins the parts of all (as stream-K products do).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.cuda.kernels.activation import tanh
from sagellm_backend.cuda.kernels.attention import LEAST_SHARE, divide_keys
from sagellm_backend.cuda.kernels.early import await_before, release_next
from sagellm_backend.cuda.kernels.rotary import partners
from sagellm_backend.cuda.ops import Rotation
from sagellm_backend.cuda.plan import DeviceStep

__all__ = ["RowAttention"]

_LANES = 16
_KEYS = 64
_PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors."""
_MOST_SPLITS = 64


@triton.jit
def _turning(cos, sin, dims, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Each dimension's partner in the rotated plane, whether there is one, and the factors of the two: x · c + partner · s."""
    pair, is_first, partner = partners(dims, HALF, INTERLEAVED)
    turns = dims < 2 * HALF
    c = tl.load(cos + pair, turns, 1.0)
    s = tl.load(sin + pair, turns, 0.0)
    return partner, turns, c, tl.where(is_first, -s, s)


@triton.jit
def _turned(
    at, live, partner, turns, c, s, gain, dims, eps, HEAD_DIM: tl.constexpr, HAS_NORM: tl.constexpr
):  # fmt: skip
    """Norm and rotate the head at each of `at`, (LANES,): f32 (LANES, dims)."""
    x = tl.load(at[:, None] + dims[None, :], live[:, None] & (dims < HEAD_DIM)[None, :], 0.0).to(tl.float32)
    other = tl.load(at[:, None] + partner[None, :], live[:, None] & turns[None, :], 0.0).to(tl.float32)
    if HAS_NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
        x = x * inverse[:, None] * tl.load(gain + dims, dims < HEAD_DIM, 0.0)[None, :]
        other = other * inverse[:, None] * tl.load(gain + partner, turns, 0.0)[None, :]
    return x * c[None, :] + other * s[None, :]


@triton.jit
def _scored(scores, scale, cap, HAS_CAP: tl.constexpr):
    """Scaled, capped, and in powers of two."""
    scores = scores * scale
    if HAS_CAP:
        scores = cap * tanh(scores / cap)
    return scores * 1.4426950408889634


@triton.jit
def _past(
    queries, head_at, table, from_key, to_key, earliest, scale, cap, block_stride, value_stride, dims,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of the pages, of which those before `earliest` are out of sight: peak, sum and values (LANES, …)."""
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, BLOCK_D), tl.float32)
    dim_live = dims < HEAD_DIM
    for key0 in range(from_key, to_key, KEYS):
        key = key0 + tl.arange(0, KEYS)
        there = key < to_key
        block = tl.load(table + key // PAGE, there, 0).to(tl.int64)
        place = block * block_stride + (key % PAGE) * HEAD_DIM
        keys = tl.load(head_at + place[None, :] + dims[:, None], there[None, :] & dim_live[:, None], 0.0)
        values = tl.load(
            head_at + value_stride + place[:, None] + dims[None, :], there[:, None] & dim_live[None, :], 0.0
        )
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee")
        seen = there & (key >= earliest)
        scores = tl.where(seen[None, :], _scored(scores, scale, cap, HAS_CAP), float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # so that -inf - -inf does not occur
        shares = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        acc = tl.dot(shares.to(queries.dtype), values.to(queries.dtype), acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(shares, 1)
        peak = higher
    return peak, total, acc


@triton.jit
def _joined(
    peaks, sums, parts, first, active, live, dims, LANES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The parts of all programs together, past the caches that may hold what was there before."""
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    for number in range(active):
        peak = tl.maximum(peak, tl.load(peaks + first + number * LANES, cache_modifier=".cg"))
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, BLOCK_D), tl.float32)
    for number in tl.range(0, active, loop_unroll_factor=4):
        each = first + number * LANES
        grow = tl.exp2(tl.load(peaks + each, cache_modifier=".cg") - peak)
        total += tl.load(sums + each, cache_modifier=".cg") * grow
        at = parts + each[:, None] * HEAD_DIM + dims[None, :]
        acc += tl.load(at, live, 0.0, cache_modifier=".cg") * grow[:, None]
    return total, acc


@triton.jit(do_not_specialize=["table_width", "window"])
def _attend_row(
    qkv, slots, starts, tables, cos, sin, q_norm, k_norm, cache, out, peaks, sums, parts, arrived,
    eps, scale, cap, window, table_width, block_stride, value_stride, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    if EARLY:
        release_next()
        await_before()
    position = tl.load(starts + row)
    low, share, active = divide_keys(position, position, window, splits, 0, KEYS, LEAST, HAS_WINDOW, False)
    if split >= active:
        return
    lane, dims = tl.arange(0, LANES), tl.arange(0, BLOCK_D)
    live = (lane < group)[:, None] & (dims < HEAD_DIM)[None, :]
    partner, turns, c, s = _turning(cos + row * HALF, sin + row * HALF, dims, HALF, INTERLEAVED)
    source = qkv + row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    q_at = source + (kv_head * group + lane) * HEAD_DIM
    queries = _turned(q_at, lane < group, partner, turns, c, s, q_norm, dims, eps, HEAD_DIM, HAS_NORM).to(
        qkv.dtype.element_ty
    )
    head_at = cache + kv_head * PAGE * HEAD_DIM
    from_key = low + split * share
    earliest = 0
    if HAS_WINDOW:
        earliest = position - window + 1
    peak, total, acc = _past(
        queries, head_at, tables + row * table_width, from_key, tl.minimum(from_key + share, position), earliest,
        scale, cap, block_stride, value_stride, dims, HEAD_DIM, PAGE, LANES, KEYS, BLOCK_D, HAS_CAP,
    )  # fmt: skip
    if split == active - 1:
        # One head in as many lanes as a tile has: all are the same, and one is written.
        k_at = source + (HEADS + kv_head + lane * 0) * HEAD_DIM
        own_key = _turned(k_at, lane < LANES, partner, turns, c, s, k_norm, dims, eps, HEAD_DIM, HAS_NORM).to(
            cache.dtype.element_ty
        )
        v_at = source + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
        own_value = tl.load(v_at + dims, dims < HEAD_DIM, 0.0).to(cache.dtype.element_ty)
        slot = tl.load(slots + row).to(tl.int64)
        to = head_at + (slot // PAGE) * block_stride + (slot % PAGE) * HEAD_DIM + dims
        tl.store(to[None, :] + lane[:, None] * 0, own_key, (lane == 0)[:, None] & (dims < HEAD_DIM)[None, :])
        tl.store(to + value_stride, own_value, dims < HEAD_DIM)
        own = tl.sum(queries.to(tl.float32) * own_key.to(queries.dtype).to(tl.float32), 1)
        own = _scored(own, scale, cap, HAS_CAP)
        higher = tl.maximum(peak, own)
        fade, grow = tl.exp2(peak - higher), tl.exp2(own - higher)
        acc = acc * fade[:, None] + grow[:, None] * own_value.to(tl.float32)[None, :]
        total = total * fade + grow
        peak = higher

    out_at = out + (row.to(tl.int64) * HEADS + kv_head * group + lane)[:, None] * HEAD_DIM + dims[None, :]
    if active == 1:
        tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), live)
    else:
        first = (row * KV_HEADS + kv_head) * splits * LANES + lane
        part = first + split * LANES
        tl.store(peaks + part, peak)
        tl.store(sums + part, total)
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], acc, live)
        # All threads' parts are written before the counter says so.
        tl.debug_barrier()
        ticket = tl.atomic_add(arrived + row * KV_HEADS + kv_head, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if ticket == active - 1:
            tl.store(arrived + row * KV_HEADS + kv_head, 0)  # for the next launch
            total, acc = _joined(peaks, sums, parts, first, active, live, dims, LANES, HEAD_DIM, BLOCK_D)
            tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), live)


class RowAttention:
    """Attention of steps that have one row a sequence.

    Args:
        most_rows: of a step.
        n_heads, n_kv_heads, head_dim: sizes.
        device: where the parts and counters are kept.
        early: launch each kernel while the one before it ends.
    """

    def __init__(
        self, most_rows: int, n_heads: int, n_kv_heads: int, head_dim: int, device: torch.device, *, early: bool
    ) -> None:
        self._heads, self._kv_heads, self._head_dim, self._early = n_heads, n_kv_heads, head_dim, early
        self._lanes = max(_LANES, triton.next_power_of_2(n_heads // n_kv_heads))
        self._splits = [min(_MOST_SPLITS, max(1, _PROGRAMS // (n_kv_heads * rows))) for rows in range(1, most_rows + 1)]
        parts = max(rows * n_kv_heads * splits * self._lanes for rows, splits in enumerate(self._splits, 1))
        self._peaks, self._sums = (torch.empty(parts, dtype=torch.float32, device=device) for _ in range(2))
        self._parts = torch.empty(parts * head_dim, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(most_rows * n_kv_heads, dtype=torch.int32, device=device)

    def attend(
        self,
        qkv: torch.Tensor,
        step: DeviceStep,
        rotation: Rotation,
        cache: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        *,
        scale: float,
        window: int,
        cap: float,
    ) -> torch.Tensor:
        """What `TorchOps.rotate_and_store` and then `TorchOps.attend` give: (rows, heads · head_dim)."""
        rows = qkv.shape[0]
        out = torch.empty((rows, self._heads * self._head_dim), dtype=qkv.dtype, device=qkv.device)
        splits = self._splits[rows - 1]
        q_norm, k_norm = (None, None) if norms is None else norms
        _attend_row[(self._kv_heads, splits, rows)](
            qkv, step.slots, step.starts, step.tables, rotation.cos, rotation.sin, q_norm, k_norm, cache, out,
            self._peaks, self._sums, self._parts, self._arrived,
            eps, scale, cap, window, step.tables.stride(0), cache.stride(0), cache.stride(1), splits,
            HEADS=self._heads, KV_HEADS=self._kv_heads, HEAD_DIM=self._head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(self._head_dim)), HALF=rotation.cos.shape[1],
            INTERLEAVED=rotation.interleaved, PAGE=BLOCK_SIZE, LANES=self._lanes, KEYS=_KEYS, LEAST=LEAST_SHARE,
            HAS_NORM=norms is not None, HAS_CAP=cap > 0, HAS_WINDOW=window > 0, EARLY=self._early,
            num_warps=4, num_stages=3, **({"launch_pdl": True} if self._early else {}),
        )  # fmt: skip
        return out
