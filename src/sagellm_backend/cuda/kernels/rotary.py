"""Angles of a step; norm and rotation of q and k, and the way of k and v into the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sagellm_backend.base import BLOCK_SIZE

__all__ = ["angles", "partners", "rotate_and_store"]


@triton.jit
def _angles(positions, frequencies, cos, sin, magnitude, HALF: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    live = pair < HALF
    angle = tl.load(positions + row).to(tl.float64) * tl.load(frequencies + pair, live, 0.0)
    tl.store(cos + row * HALF + pair, tl.cos(angle).to(tl.float32) * magnitude, live)
    tl.store(sin + row * HALF + pair, tl.sin(angle).to(tl.float32) * magnitude, live)


@triton.jit
def partners(dims, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each dimension: its rotated plane, whether it is the first of the two there, and the other one."""
    if INTERLEAVED:
        pair, is_first = dims // 2, dims % 2 == 0
        partner = tl.where(is_first, dims + 1, dims - 1)
    else:
        pair, is_first = dims % HALF, dims < HALF
        partner = tl.where(is_first, dims + HALF, dims - HALF)
    return pair, is_first, partner


@triton.jit
def _one_of(first, second, at, live, which):
    """What `first` holds where `which` is 0, what `second` holds elsewhere."""
    return tl.load(first + at, live & (which == 0), 0.0) + tl.load(second + at, live & (which != 0), 0.0)


@triton.jit
def _rotate_and_store(
    qkv, slots, cos, sin, q_norm, k_norm, q_out, cache, eps, block_stride, value_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    live = dims < HEAD_DIM
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM
    value = tl.load(source + dims, live, 0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        # Each dimension needs its partner in the rotated plane: the same head is loaded once more, permuted.
        pair, is_first, partner = partners(dims, HALF, INTERLEAVED)
        turned = dims < 2 * HALF
        other = tl.load(source + partner, turned, 0.0).to(tl.float32)
        if HAS_NORM:
            inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / HEAD_DIM + eps)
            is_k = dims * 0 + head // HEADS
            value = value * inverse * _one_of(q_norm, k_norm, dims, live, is_k)
            other = other * inverse * _one_of(q_norm, k_norm, partner, turned, is_k)
        c = tl.load(cos + row * HALF + pair, turned, 1.0)
        s = tl.load(sin + row * HALF + pair, turned, 0.0)
        value = value * c + tl.where(is_first, -other, other) * s
    if head < HEADS:
        tl.store(q_out + (row * HEADS + head) * HEAD_DIM + dims, value.to(q_out.dtype.element_ty), live)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        kv_head = (head - HEADS) % KV_HEADS
        place = (slot // PAGE) * block_stride + (kv_head * PAGE + slot % PAGE) * HEAD_DIM
        if head >= HEADS + KV_HEADS:
            place += value_stride
        tl.store(cache + place + dims, value.to(cache.dtype.element_ty), live)


def angles(positions: torch.Tensor, frequencies: torch.Tensor, magnitude: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `TorchOps.angles`."""
    rows, half = positions.numel(), frequencies.numel()
    cos, sin = (torch.empty((rows, half), dtype=torch.float32, device=positions.device) for _ in range(2))
    _angles[(rows,)](
        positions, frequencies, cos, sin, magnitude, HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1
    )
    return cos, sin


def rotate_and_store(
    qkv: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    n_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    *,
    interleaved: bool,
) -> torch.Tensor:
    """See `TorchOps.rotate_and_store`; `cache` is (blocks, 2, kv_heads, BLOCK_SIZE, head_dim), possibly strided by block."""
    rows = qkv.shape[0]
    kv_heads, head_dim = cache.shape[2], cache.shape[4]
    q = torch.empty((rows, n_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = (None, None) if norms is None else norms
    _rotate_and_store[(rows, n_heads + 2 * kv_heads)](
        qkv, slots, cos, sin, q_norm, k_norm, q, cache, eps, cache.stride(0), cache.stride(1),
        HEADS=n_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=cos.shape[1], INTERLEAVED=interleaved,
        HAS_NORM=norms is not None, PAGE=BLOCK_SIZE, BLOCK=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return q
