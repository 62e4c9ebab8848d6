"""The operations of a step by Triton kernels; plain products of 16 or 32 bits go to the vendor's library.

In batch-invariant mode everything goes through our own kernels with one tile shape and fixed spans of keys.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.cuda.kernels import activation, attention, draw, embed, matmul, norm, rotary
from sagellm_backend.cuda.matrix import Matrix
from sagellm_backend.cuda.ops import AttentionShape, Rotation, Routes, TorchOps
from sagellm_backend.cuda.plan import DeviceStep
from sagellm_backend.cuda.tiles import FIXED, Tiles, tiles_for
from sagellm_backend.cuda.weighted import high_product
from sagellm_backend.cuda.weights import Projection

__all__ = ["TritonOps", "attend_prompt"]

_LANES = 16
"""Least rows of a tensor-core product."""
_LONG_LANES = 64
_PROMPT_ROWS = 256
"""Fewer rows are better off in one launch with those of others."""
_SPAN = 1024
"""Keys of one split in batch-invariant mode."""
_PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors: more do not fit at once anyway."""
_MAX_SPLITS = 32
_KEY_BYTES = 64 * 128 * 2


class TritonOps(TorchOps):
    """See `TorchOps`.

    Args:
        dtype: of activations.
        group: query heads of a KV head.
        invariant: fix all tiles and splits.
        gather_prompts: attend to prompts of some length by torch's own attention, over keys that are gathered first; for models
            without windows and soft caps, which it does not know.
    """

    def __init__(
        self, dtype: torch.dtype, group: int, *, invariant: bool = False, gather_prompts: bool = False
    ) -> None:
        super().__init__(dtype)
        self._invariant = invariant
        self.prompt_rows = _PROMPT_ROWS if gather_prompts and not invariant else 0
        self.short_rows = max(1, _LANES // group)
        self.long_rows = 0 if invariant else max(1, _LONG_LANES // group)
        self._short_lanes, self._long_lanes = (_lanes(rows * group) for rows in (self.short_rows, self.long_rows))

    def follow(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """See `TorchOps.follow`."""
        return embed.follow(tokens, last)

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, magnitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TorchOps.angles`."""
        return rotary.angles(positions, frequencies, magnitude)

    def embed(self, table: Matrix, tokens: torch.Tensor, scale: float) -> torch.Tensor:
        """See `TorchOps.embed`."""
        return embed.embed(table, tokens, scale)

    def residual_norm(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TorchOps.residual_norm`; `x` is changed in place."""
        return x, norm.residual_norm(x, branch, post, weight, eps, scale, self.dtype)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `TorchOps.norm`."""
        return norm.rms_norm(x, weight, eps)

    def linear(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """See `TorchOps.linear`."""
        if len(projection.parts) > 1:
            return super().linear(x, projection)
        (matrix,) = projection.parts
        if matrix.kind == "dense" and not self._invariant:
            return functional.linear(x, matrix.data, projection.bias)
        return matmul.matmul(x, matrix, self._tiles(x.shape[0]), bias=projection.bias)

    def matmul(self, x: torch.Tensor, matrix: Matrix, *, exact: bool = False) -> torch.Tensor:
        """See `TorchOps.matmul`."""
        if matrix.kind == "dense" and not exact and not self._invariant:
            return functional.linear(x, matrix.data)
        return matmul.matmul(x, matrix, self._tiles(x.shape[0]), out_dtype=torch.float32 if exact else None)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        step: DeviceStep,
        rotation: Rotation,
        cache: torch.Tensor,
        shape: AttentionShape,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> torch.Tensor:
        """See `TorchOps.rotate_and_store`."""
        return rotary.rotate_and_store(
            qkv,
            step.slots,
            rotation.cos,
            rotation.sin,
            cache,
            shape.n_heads,
            head_norms,
            eps,
            interleaved=rotation.interleaved,
        )

    def attend(self, q: torch.Tensor, step: DeviceStep, cache: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
        """See `TorchOps.attend`."""
        out = torch.empty_like(q)
        rows = (step.starts, step.firsts, step.lengths)
        for tiles, tile in ((step.short, self._short_tile(step, shape)), (step.long, self._long_tile(shape))):
            attention.attend(
                q, cache, step.tables, tiles, rows, out, tile, scale=shape.scale, window=shape.window, cap=shape.softcap
            )
        for prompt in step.prompts:
            table = step.tables[prompt.sequence, : -(-prompt.end // BLOCK_SIZE)].long()
            keys, values = (
                cache[:, i].transpose(0, 1)[:, table].flatten(1, 2)[:, : prompt.end].to(q.dtype) for i in (0, 1)
            )
            out[prompt.rows] = attend_prompt(q[prompt.rows], keys, values, shape.scale)
        return out.flatten(1)

    def activate(self, gate_up: torch.Tensor, kind: Literal["silu", "gelu_tanh", "gelu"]) -> torch.Tensor:
        """See `TorchOps.activate`."""
        return activation.activate(gate_up, kind)

    def routes(self, source: torch.Tensor, chosen: torch.Tensor, n_matrices: int) -> Routes:
        """Sort the products by their matrix into tiles of one matrix each, without asking the device for sizes."""
        tiles_of = self._tiles(chosen.numel() // n_matrices)
        n, tile = chosen.numel(), tiles_of.rows
        key = torch.where(chosen < 0, n_matrices, chosen)
        ordered, product = torch.sort(key, stable=True)
        counts = torch.zeros(n_matrices + 1, dtype=torch.int64, device=key.device)
        counts.scatter_add_(0, key, torch.ones_like(key))
        tiles = (counts[:-1] + tile - 1) // tile
        ends = torch.cumsum(tiles, 0)
        most = -(-n // tile) + n_matrices
        # Products without a matrix are written behind the last tile, where nobody looks.
        begins = functional.pad((ends - tiles) * tile, (0, 1), value=most * tile)
        first = torch.cumsum(counts, 0) - counts
        within = torch.arange(n, device=key.device) - first[ordered]
        order = torch.full((most * tile + n,), n, dtype=torch.int32, device=key.device)
        order[begins[ordered] + within] = product.to(torch.int32)
        matrix = torch.searchsorted(ends, torch.arange(most, device=key.device), right=True)
        return Routes(source, chosen, order, torch.where(matrix < n_matrices, matrix, -1).to(torch.int32), tiles_of)

    def grouped(self, x: torch.Tensor, matrix: Matrix, routes: Routes) -> torch.Tensor:
        """See `TorchOps.grouped`."""
        assert routes.order is not None
        assert routes.tile_matrix is not None
        assert routes.tiles is not None
        return matmul.matmul(x, matrix, routes.tiles, routes=(routes.order, routes.tile_matrix, routes.source))

    def draw_plain(self, z: torch.Tensor, best: torch.Tensor, scale: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """See `TorchOps.draw_plain`."""
        running = torch.cumsum(draw.chunk_sums(z, best, scale), dim=1)
        total = running[:, -1]
        target = high_product(words, total)
        chunk = (running <= target[:, None]).sum(dim=1).clamp(max=running.shape[1] - 1)
        before = torch.where(chunk > 0, torch.gather(running, 1, (chunk - 1).clamp(min=0)[:, None])[:, 0], 0)
        token = draw.pick_in_chunk(z, best, scale, chunk, target - before)
        return torch.where(total > 0, token, -1)

    def apply_masks(self, z: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
        """See `TorchOps.apply_masks`."""
        draw.apply_masks(z, rows, masks)

    def _tiles(self, rows: int) -> Tiles:
        return FIXED if self._invariant else tiles_for(rows)

    def _short_tile(self, step: DeviceStep, shape: AttentionShape) -> attention.TileShape:
        if self._invariant:
            splits = max(1, -(-step.tables.shape[1] * BLOCK_SIZE // _SPAN))
            return attention.TileShape(self.short_rows, self._short_lanes, self._keys(shape), splits, _SPAN, 4)
        programs = max(1, step.short.shape[0] * shape.n_kv_heads)
        splits = min(_MAX_SPLITS, max(1, _PROGRAMS // programs))
        return attention.TileShape(self.short_rows, self._short_lanes, self._keys(shape), splits, 0, 4)

    def _keys(self, shape: AttentionShape) -> int:
        """Keys looked at in one go: as many bytes of them for wide heads and wide numbers as for usual ones."""
        fitting = _KEY_BYTES // (shape.head_dim * int(self.dtype.itemsize))
        return min(64, max(16, 1 << (max(fitting, 1).bit_length() - 1)))

    def _long_tile(self, shape: AttentionShape) -> attention.TileShape:
        return attention.TileShape(self.long_rows, self._long_lanes, self._keys(shape), 1, 0, 4)


def attend_prompt(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last rows of a sequence: q (rows, heads, head_dim), keys and values (kv_heads, end, head_dim)."""
    rows, end = q.shape[0], keys.shape[1]
    whole = rows == end
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], attn_mask=None if whole else causal_lower_right(rows, end),
        is_causal=whole, scale=scale, enable_gqa=q.shape[1] != keys.shape[0],
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _lanes(used: int) -> int:
    return max(_LANES, 1 << max(used - 1, 0).bit_length())
