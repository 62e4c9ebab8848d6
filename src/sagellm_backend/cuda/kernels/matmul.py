"""``x @ W.T`` for every kind of matrix, one for all rows or one of several for each (experts, adapters).

A tile of W is unpacked in registers on its way to the tensor cores, so a decode step reads the packed bytes and nothing else.
Products are summed along the inputs in one order, `Tiles.inputs` at a time: with fixed tiles a row's bits do not depend on
the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sagellm_backend.cuda.kernels.embed import KINDS
from sagellm_backend.cuda.matrix import Matrix
from sagellm_backend.cuda.tiles import Tiles

__all__ = ["matmul"]


@triton.jit
def _scaled(quants, scales, minima, group, live, HAS_MIN: tl.constexpr):
    value = quants.to(tl.float32) * tl.load(scales + group, live, 0.0).to(tl.float32)
    if HAS_MIN:
        value += tl.load(minima + group, live, 0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["n_products"])
def _matmul(
    x, w, scales, minima, bias, out, order, tile_matrix, source, n_products, n_outputs, n_inputs,
    KIND: tl.constexpr, HAS_MIN: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if GROUPED:
        matrix = tl.load(tile_matrix + tile).to(tl.int64)
        if matrix < 0:
            return
        product = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        row_live = product < n_products
        rows = tl.load(source + product, row_live, 0).to(tl.int64)
    else:
        matrix = 0
        product = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_live = product < n_products
        rows = product.to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_live = cols < n_outputs
    output = matrix * n_outputs + cols.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_inputs, BLOCK_K):
        if KIND == 2:
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            low = (byte // (GROUP // 2)) * GROUP + byte % (GROUP // 2)
            live = col_live[:, None] & (low < n_inputs)[None, :]
            packed = tl.load(w + output[:, None] * (n_inputs // 2) + byte[None, :], live, 0)
            group = output[:, None] * (n_inputs // GROUP) + (byte // (GROUP // 2))[None, :]
            w_low = _scaled(packed & 15, scales, minima, group, live, HAS_MIN).to(COMPUTE)
            w_high = _scaled(packed >> 4, scales, minima, group, live, HAS_MIN).to(COMPUTE)
            x_live = row_live[:, None] & (low < n_inputs)[None, :]
            at = x + rows[:, None] * n_inputs + low[None, :]
            x_low = tl.load(at, x_live, 0.0).to(COMPUTE)
            x_high = tl.load(at + GROUP // 2, x_live, 0.0).to(COMPUTE)
            acc = tl.dot(x_low, tl.trans(w_low), acc, input_precision="ieee")
            acc = tl.dot(x_high, tl.trans(w_high), acc, input_precision="ieee")
        else:
            inputs = start + tl.arange(0, BLOCK_K)
            in_live = inputs < n_inputs
            live = col_live[:, None] & in_live[None, :]
            tile_w = tl.load(w + output[:, None] * n_inputs + inputs[None, :], live, 0.0)
            if KIND == 1:
                group = output[:, None] * (n_inputs // GROUP) + (inputs // GROUP)[None, :]
                tile_w = _scaled(tile_w, scales, minima, group, live, HAS_MIN)
            tile_x = tl.load(x + rows[:, None] * n_inputs + inputs[None, :], row_live[:, None] & in_live[None, :], 0.0)
            acc = tl.dot(tile_x.to(COMPUTE), tl.trans(tile_w.to(COMPUTE)), acc, input_precision="ieee")
    if KIND == 3:
        acc = acc * tl.load(scales + output, col_live, 0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + cols, col_live, 0.0).to(tl.float32)[None, :]
    place = out + product.to(tl.int64)[:, None] * n_outputs + cols[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), row_live[:, None] & col_live[None, :])


def matmul(
    x: torch.Tensor,
    matrix: Matrix,
    tiles: Tiles,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    routes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Multiply.

    Args:
        x: (rows, inputs), contiguous.
        matrix: (outputs, inputs), or (matrices, outputs, inputs) with `routes`.
        tiles: its rows must be those that `routes` was made for.
        bias: (outputs,), or None.
        out_dtype: None is that of `x`.
        routes: order, tile_matrix and source of `Routes`.

    Returns:
        (rows, outputs), or (products, outputs) with zeros where a product has no matrix.
    """
    products = x.shape[0] if routes is None else routes[2].numel()
    make = torch.empty if routes is None else torch.zeros
    out = make((products, matrix.outputs), dtype=out_dtype or x.dtype, device=x.device)
    order, tile_matrix, source = (None, None, None) if routes is None else routes
    n_tiles = triton.cdiv(products, tiles.rows) if routes is None else routes[1].numel()
    exact = torch.float32 in (x.dtype, matrix.data.dtype)
    # Numbers of 32 bits take twice the shared memory, so their tiles are half as long.
    block_k = tiles.inputs // 2 if exact else tiles.inputs
    _matmul[(n_tiles, triton.cdiv(matrix.outputs, tiles.outputs))](
        x, matrix.data, matrix.scale, matrix.minimum, bias, out, order, tile_matrix, source,
        products, matrix.outputs, matrix.inputs,
        KIND=KINDS[matrix.kind], HAS_MIN=matrix.minimum is not None, HAS_BIAS=bias is not None,
        GROUPED=routes is not None, GROUP=matrix.group, COMPUTE=_COMPUTE[torch.float32 if exact else x.dtype],
        BLOCK_M=tiles.rows, BLOCK_N=tiles.outputs, BLOCK_K=block_k, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


_COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
