"""Block formats in numpy: every `Format` to float32, and back for those that we also write.

The layouts are ggml's (``ggml-common.h``, ``ggml-quants.c``); arithmetic is float32 in ggml's order, so that the values are
the ones that its own dequantisation gives. Work is done in slices of `SLICE_BLOCKS` blocks: temporaries stay small
whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sagellm_backend.tensors import Format, Tensor
from sagellm_protocol.errors import UnsupportedError

__all__ = ["dequantize", "quantize", "round_trip"]

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

SLICE_BLOCKS = 16384


def dequantize(tensor: Tensor) -> Float32:
    """Return the tensor's values as a new float32 array of `tensor.shape`."""
    fmt = tensor.format
    if fmt is Format.F32:
        return np.array(tensor.data.view("<f4").reshape(tensor.shape), dtype=np.float32)
    blocks = tensor.data.reshape(-1, fmt.block_bytes)
    out = np.empty((blocks.shape[0], fmt.block), np.float32)
    decode = _DECODE[fmt]
    for start in range(0, blocks.shape[0], SLICE_BLOCKS):
        rows = slice(start, start + SLICE_BLOCKS)
        out[rows] = decode(blocks[rows])
    return out.reshape(tensor.shape)


def quantize(array: npt.NDArray[np.float32], fmt: Format) -> Tensor:
    """Return `array` in `fmt`, rounded as ggml's reference quantisers round.

    Raises:
        UnsupportedError: there is no quantiser for `fmt`.
        ValueError: the last axis is not a multiple of the block.
    """
    encode = _ENCODE.get(fmt)
    if encode is None:
        known = ", ".join(f.name for f in _ENCODE)
        raise UnsupportedError(f"there is no quantiser to {fmt.name}: use one of {known}", param="quant")
    if array.ndim == 0 or array.shape[-1] % fmt.block:
        raise ValueError(
            f"the last axis of shape {array.shape} must be a multiple of {fmt.name}'s block of {fmt.block}"
        )
    rows = np.ascontiguousarray(array, dtype=np.float32).reshape(-1, fmt.block)
    data = np.empty((rows.shape[0], fmt.block_bytes), np.uint8)
    for start in range(0, rows.shape[0], SLICE_BLOCKS):
        part = slice(start, start + SLICE_BLOCKS)
        data[part] = encode(rows[part])
    return Tensor(tuple(array.shape), fmt, data.reshape(-1))


def round_trip(array: npt.NDArray[np.float32], fmt: Format) -> Float32:
    """Return the values that are left of `array` after a stay in `fmt`."""
    return dequantize(quantize(array, fmt))


def _f16(blocks: Bytes, at: int) -> Float32:
    """The half-precision number at byte `at` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(blocks, n) bytes -> (blocks, 2n): all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The 32 bits at byte `at` of each block, shifted to be the fifth bit of 32 quants."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return np.left_shift(bits, 4, dtype=np.uint8)


def _half(blocks: Bytes) -> Float32:
    return _f16(blocks, 0)


def _bf16(blocks: Bytes) -> Float32:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Float32:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _f16(blocks, 0)


def _q4_1(blocks: Bytes) -> Float32:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _f16(blocks, 0) + _f16(blocks, 2)


def _q5_0(blocks: Bytes) -> Float32:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (quants.astype(np.float32) - 16) * _f16(blocks, 0)


def _q5_1(blocks: Bytes) -> Float32:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return quants.astype(np.float32) * _f16(blocks, 0) + _f16(blocks, 2)


def _q8_0(blocks: Bytes) -> Float32:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _f16(blocks, 0)


def _k_scales(blocks: Bytes) -> tuple[Float32, Float32]:
    """Scale and minimum of the 8 sub-blocks of a Q4_K or Q5_K block, (blocks, 8, 1) each.

    Twelve bytes hold sixteen 6-bit numbers: those of sub-blocks 0-3 in the low six bits of bytes 0-7, those of 4-7 in the
    nibbles of bytes 8-11 with their upper two bits on top of bytes 0-7.
    """
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    scale = scales.astype(np.float32) * _f16(blocks, 0)
    minimum = minima.astype(np.float32) * _f16(blocks, 2)
    return scale[:, :, None], minimum[:, :, None]


def _k_nibbles(packed: Bytes) -> Bytes:
    """128 bytes -> (blocks, 8, 32): each run of 32 bytes holds two sub-blocks, low nibbles first."""
    runs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Float32:
    scale, minimum = _k_scales(blocks)
    values = _k_nibbles(blocks[:, 16:]).astype(np.float32) * scale - minimum
    return values.reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Float32:
    scale, minimum = _k_scales(blocks)
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    quants = _k_nibbles(blocks[:, 48:]) | (fifth << 4)
    values = quants.astype(np.float32) * scale - minimum
    return values.reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Float32:
    # Two halves of 128 values: 64 bytes of nibbles and 32 bytes of 2-bit tops give four runs of 32.
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    tops = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    quants = (nibbles | (tops << 4)).astype(np.float32) - 32
    scale = blocks[:, 192:208].view(np.int8).astype(np.float32) * _f16(blocks, 208)
    values: Float32 = quants.reshape(-1, 16, 16) * scale[:, :, None]
    return values.reshape(-1, 256)


_DECODE: dict[Format, Callable[[Bytes], Float32]] = {
    Format.F16: _half,
    Format.BF16: _bf16,
    Format.Q4_0: _q4_0,
    Format.Q4_1: _q4_1,
    Format.Q5_0: _q5_0,
    Format.Q5_1: _q5_1,
    Format.Q8_0: _q8_0,
    Format.Q4_K: _q4_k,
    Format.Q5_K: _q5_k,
    Format.Q6_K: _q6_k,
}


def _bytes_of(values: npt.NDArray[np.generic]) -> Bytes:
    """(blocks, n) numbers -> (blocks, n · itemsize) bytes."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(values.shape[0], -1)


def _inverse(d: Float32) -> Float32:
    out: Float32 = np.zeros_like(d)
    np.divide(np.float32(1), d, out=out, where=d != 0)
    return out


def _pack_nibbles(quants: npt.NDArray[np.generic]) -> Bytes:
    q = quants.astype(np.uint8)
    return q[:, :16] | np.left_shift(q[:, 16:], 4, dtype=np.uint8)


def _to_f32(rows: Float32) -> Bytes:
    return _bytes_of(rows.astype("<f4"))


def _to_f16(rows: Float32) -> Bytes:
    with np.errstate(over="ignore"):  # beyond 65504 is infinity, as in ggml
        return _bytes_of(rows.astype("<f2"))


def _to_bf16(rows: Float32) -> Bytes:
    bits = rows.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return _bytes_of(np.where(np.isnan(rows), quiet, rounded).astype("<u2"))


def _to_q4_0(rows: Float32) -> Bytes:
    extreme = np.take_along_axis(rows, np.argmax(np.abs(rows), axis=1)[:, None], axis=1)
    d = extreme / np.float32(-8)
    quants = np.minimum(15, (rows * _inverse(d) + np.float32(8.5)).astype(np.int8))
    return np.concatenate([_to_f16(d), _pack_nibbles(quants)], axis=1)


def _to_q4_1(rows: Float32) -> Bytes:
    low = rows.min(axis=1, keepdims=True)
    d = (rows.max(axis=1, keepdims=True) - low) / np.float32(15)
    quants = np.minimum(15, ((rows - low) * _inverse(d) + np.float32(0.5)).astype(np.int8))
    return np.concatenate([_to_f16(d), _to_f16(low), _pack_nibbles(quants)], axis=1)


def _to_q8_0(rows: Float32) -> Bytes:
    d = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    scaled = rows * _inverse(d)
    quants = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # halves away from zero
    return np.concatenate([_to_f16(d), quants.view(np.uint8)], axis=1)


_ENCODE: dict[Format, Callable[[Float32], Bytes]] = {
    Format.F32: _to_f32,
    Format.F16: _to_f16,
    Format.BF16: _to_bf16,
    Format.Q4_0: _to_q4_0,
    Format.Q4_1: _to_q4_1,
    Format.Q8_0: _to_q8_0,
}
