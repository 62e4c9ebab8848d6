"""Attention over the paged cache, for decode and for chunks of prompts alike.

A tile holds a few rows of one sequence times all query heads of one KV head, so that keys and values are read once for the
group. Decode splits the keys of a tile over several programs and joins their softmaxes (Dao et al., Flash-Decoding, 2023);
a chunk of a prompt has tiles enough and does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.cuda.kernels.activation import tanh

__all__ = ["LEAST_SHARE", "TileShape", "attend", "divide_keys"]

LEAST_SHARE = 128
"""Keys below which another program costs more than it saves."""
_JOINED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a kind of tile is worked on.

    Attributes:
        rows: of the sequence, each with all heads of the group.
        lanes: rows times heads, rounded up to a power of two that is at least 16.
        keys: looked at in one go.
        splits: programs that share the keys of a tile.
        span: keys of each of them, fixed from position 0 on; 0 divides what there is evenly.
        warps: of a program.
        stages: tiles of keys on their way at once.
    """

    rows: int
    lanes: int
    keys: int
    splits: int
    span: int
    warps: int
    stages: int = 2


@triton.jit
def divide_keys(
    end, first_position, window, splits, span,
    KEYS: tl.constexpr, LEAST: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SPAN: tl.constexpr,
):  # fmt: skip
    """The first key that a tile looks at, the keys of each split, and how many splits have any."""
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
    if HAS_SPAN:
        active = tl.cdiv(end, span)
        share = span
    else:
        share = tl.maximum(tl.cdiv(tl.cdiv(end - low, splits), KEYS) * KEYS, LEAST)
        active = tl.maximum(tl.cdiv(end - low, share), 1)
    return low, share, active


@triton.jit(do_not_specialize=["window", "table_width", "splits", "span"])
def _attend(
    q, cache, tables, tiles, starts, firsts, lengths, out, peaks, sums, parts,
    scale, cap, window, table_width, block_stride, value_stride, splits, span,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, SPLIT: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SPAN: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + 2 * tile).to(tl.int64)
    row0 = tl.load(tiles + 2 * tile + 1)
    start, n_rows, first = tl.load(starts + sequence), tl.load(lengths + sequence), tl.load(firsts + sequence)
    end = start + tl.minimum(row0 + ROWS, n_rows)
    low, share, active = divide_keys(end, start + row0, window, splits, span, KEYS, LEAST, HAS_WINDOW, HAS_SPAN)
    if SPLIT and split >= active:
        return
    lane = tl.arange(0, LANES)
    row = row0 + lane // GROUP
    lane_live = (row < n_rows) & (lane < ROWS * GROUP)
    position = start + row
    dims = tl.arange(0, BLOCK_D)
    dim_live = dims < HEAD_DIM
    head = kv_head * GROUP + lane % GROUP
    at = ((first + row).to(tl.int64) * HEADS + head) * HEAD_DIM
    queries = tl.load(q + at[:, None] + dims[None, :], lane_live[:, None] & dim_live[None, :], 0.0)

    if HAS_SPAN:
        from_key = tl.maximum(split * span, low)
        to_key = tl.minimum(split * span + span, end)
    else:
        from_key = low + split * share
        to_key = tl.minimum(from_key + share, end)

    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, BLOCK_D), tl.float32)
    head_at = cache + kv_head * PAGE * HEAD_DIM
    for key0 in range(from_key, to_key, KEYS):
        key = key0 + tl.arange(0, KEYS)
        key_live = key < end
        block = tl.load(tables + sequence * table_width + key // PAGE, key_live, 0).to(tl.int64)
        place = block * block_stride + (key % PAGE) * HEAD_DIM
        keys = tl.load(head_at + place[None, :] + dims[:, None], key_live[None, :] & dim_live[:, None], 0.0)
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scale
        if HAS_CAP:
            scores = cap * tanh(scores / cap)
        seen = (key[None, :] <= position[:, None]) & key_live[None, :]
        if HAS_WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A lane that has seen nothing yet keeps a peak of -inf; 0 stands in for it, so that -inf - -inf does not occur.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        values = tl.load(
            head_at + value_stride + place[:, None] + dims[None, :], key_live[:, None] & dim_live[None, :], 0.0
        )
        acc = acc * fade[:, None]
        acc = tl.dot(shares.to(queries.dtype), values.to(queries.dtype), acc, input_precision="ieee")
        total = total * fade + tl.sum(shares, 1)
        peak = higher
    if SPLIT:
        part = ((tile.to(tl.int64) * tl.num_programs(1) + kv_head) * splits + split) * LANES + lane
        tl.store(peaks + part, peak)
        tl.store(sums + part, total)
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], acc, dim_live[None, :])
    else:
        result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(
            out + at[:, None] + dims[None, :], result.to(out.dtype.element_ty), lane_live[:, None] & dim_live[None, :]
        )


@triton.jit(do_not_specialize=["window", "splits", "span"])
def _join(
    tiles, starts, firsts, lengths, out, peaks, sums, parts, window, splits, span,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, AT_ONCE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SPAN: tl.constexpr,
):  # fmt: skip
    tile, kv_head, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + 2 * tile)
    row0 = tl.load(tiles + 2 * tile + 1)
    start, n_rows, first = tl.load(starts + sequence), tl.load(lengths + sequence), tl.load(firsts + sequence)
    dims = tl.arange(0, BLOCK_D)
    dim_live = dims < HEAD_DIM
    last_row = tl.minimum(row0 + ROWS, n_rows)
    _, _, active = divide_keys(
        start + last_row, start + row0, window, splits, span, KEYS, LEAST, HAS_WINDOW, HAS_SPAN
    )  # fmt: skip
    for row in range(row0, last_row):
        lane = (row - row0) * GROUP + member
        part = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * splits * LANES + lane
        peak, total = float("-inf"), 0.0
        acc = tl.zeros((BLOCK_D,), tl.float32)
        for split0 in range(0, active, AT_ONCE):
            split = split0 + tl.arange(0, AT_ONCE)
            there = split < active
            at = part + split * LANES
            peaks_there = tl.load(peaks + at, there, float("-inf"))
            higher = tl.maximum(peak, tl.max(peaks_there, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            fade, grow = tl.exp2(peak - base), tl.exp2(peaks_there - base)
            total = total * fade + tl.sum(tl.load(sums + at, there, 0.0) * grow, 0)
            live = there[:, None] & dim_live[None, :]
            found = tl.load(parts + at[:, None] * HEAD_DIM + dims[None, :], live, 0.0)
            acc = acc * fade + tl.sum(found * grow[:, None], 0)
            peak = higher
        at = ((first + row).to(tl.int64) * HEADS + kv_head * GROUP + member) * HEAD_DIM
        result = acc / tl.where(total > 0.0, total, 1.0)
        tl.store(out + at + dims, result.to(out.dtype.element_ty), dim_live)


def attend(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    tile: TileShape,
    *,
    scale: float,
    window: int,
    cap: float,
) -> None:
    """Attend for the rows of `tiles` and write them to `out`.

    Args:
        q: (rows, heads, head_dim), contiguous.
        cache: (blocks, 2, kv_heads, BLOCK_SIZE, head_dim) of one layer, possibly strided by block.
        tables: int32 (sequences, width).
        tiles: int32 (tiles, 2), sequence and first of its rows.
        rows: starts, firsts and lengths of the sequences, int32.
        out: like `q`.
        tile: the shape of these tiles.
        scale: factor of q·k.
        window: tokens seen, the row's own included; 0 sees all.
        cap: soft cap of the scaled scores; 0 is off.
    """
    n_tiles, heads, head_dim, kv_heads = tiles.shape[0], q.shape[1], q.shape[2], cache.shape[2]
    if n_tiles == 0:
        return
    shape = {
        "HEADS": heads, "GROUP": heads // kv_heads, "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "ROWS": tile.rows, "LANES": tile.lanes,
        "KEYS": tile.keys, "LEAST": LEAST_SHARE, "HAS_WINDOW": window > 0, "HAS_SPAN": tile.span > 0,
    }  # fmt: skip
    split = tile.splits > 1
    n_parts = n_tiles * kv_heads * tile.splits * tile.lanes if split else 0
    peaks, sums = (torch.empty(n_parts, dtype=torch.float32, device=q.device) for _ in range(2))
    parts = torch.empty(n_parts * head_dim, dtype=torch.float32, device=q.device)
    starts, firsts, lengths = rows
    _attend[(n_tiles, kv_heads, tile.splits)](
        q, cache, tables, tiles, starts, firsts, lengths, out, peaks, sums, parts,
        scale, cap, window, tables.shape[1], cache.stride(0), cache.stride(1), tile.splits, tile.span,
        PAGE=BLOCK_SIZE, SPLIT=split, HAS_CAP=cap > 0, **shape, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        _join[(n_tiles, kv_heads, heads // kv_heads)](
            tiles, starts, firsts, lengths, out, peaks, sums, parts, window, tile.splits, tile.span,
            AT_ONCE=_JOINED_AT_ONCE, **shape, num_warps=4,
        )  # fmt: skip
