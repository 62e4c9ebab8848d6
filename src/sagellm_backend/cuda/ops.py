"""The operations of a step in plain torch: the oracle of the Triton kernels, and what runs without a GPU.

`TritonOps` (`sagellm_backend.cuda.triton_ops`) has the same methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from sagellm_backend.base import BLOCK_SIZE
from sagellm_backend.cuda.matrix import Matrix, expand
from sagellm_backend.cuda.plan import DeviceStep
from sagellm_backend.cuda.tiles import Tiles
from sagellm_backend.cuda.weighted import draw_weighted, integer_weights
from sagellm_backend.cuda.weights import Projection

__all__ = ["AttentionShape", "Rotation", "Routes", "TorchOps", "soft_cap"]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention; see `DecoderSpec`."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of every row, f32 (rows, dim / 2), already multiplied by the magnitude."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Routes:
    """Which of several matrices each of n products uses.

    Attributes:
        source: int64 (n,), row of the input.
        chosen: int64 (n,), number of the matrix; -1 is none, and the output is then zero.
        order, tile_matrix: for kernels that work in tiles of one matrix each: int32 (tiles · tile,) numbers of products, n
            where a tile has a gap, and int32 (tiles,) the matrix of each tile, -1 for a tile without work.
        tiles: the shape of those tiles.
    """

    source: torch.Tensor
    chosen: torch.Tensor
    order: torch.Tensor | None = None
    tile_matrix: torch.Tensor | None = None
    tiles: Tiles | None = None


class TorchOps:
    """Each method computes in float32 inside and returns the activations' dtype unless it says otherwise."""

    short_rows = 1
    long_rows = 0
    prompt_rows = 0

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def follow(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Put what was drawn before in the place of negative tokens, both int32: -1 - j is ``last[j]``.

        A row that could not draw (-1) goes on with token 0, to no use.
        """
        return torch.where(tokens < 0, last[(-1 - tokens).clamp(min=0)].clamp(min=0), tokens)

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, magnitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of position · frequency (f64) times `magnitude`, f32 (rows, frequencies)."""
        turned = positions.double()[:, None] * frequencies
        return turned.cos().float() * magnitude, turned.sin().float() * magnitude

    def embed(self, table: Matrix, tokens: torch.Tensor, scale: float) -> torch.Tensor:
        """Rows of `table` times `scale`, f32 (rows, d_model)."""
        rows = tokens.long()
        picked = Matrix(
            table.kind,
            table.data[rows],
            None if table.scale is None else table.scale[rows],
            None if table.minimum is None else table.minimum[rows],
        )
        return expand(picked, torch.float32) * scale

    def residual_norm(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x + scale · norm(branch)`` in f32, and its norm: (rows, d_model) both.

        Args:
            x: f32, the residual stream.
            branch: what a block gave, or None before the first.
            post: weight of the norm on `branch`, or None for no norm.
            weight: weight of the norm on the sum, or None for no norm.
            eps: of both norms.
            scale: of the branch.
        """
        if branch is not None:
            added = branch.float() if post is None else _rms_norm(branch.float(), post, eps)
            x = x + scale * added
        normed = x if weight is None else _rms_norm(x, weight, eps)
        return x, normed.to(self.dtype)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm over the last axis, in the dtype of `x`."""
        return _rms_norm(x.float(), weight, eps).to(x.dtype)

    def linear(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """(rows, inputs) -> (rows, outputs) of all parts side by side, with the bias."""
        parts = [self.matmul(x, part) for part in projection.parts]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out if projection.bias is None else out + projection.bias

    def matmul(self, x: torch.Tensor, matrix: Matrix, *, exact: bool = False) -> torch.Tensor:
        """``x @ matrix.T``; `exact` gives f32 (logits, routers)."""
        if exact:
            return x.float() @ expand(matrix, torch.float32).T
        return x @ expand(matrix, x.dtype).T

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
        """Norm (`head_norms` of q and k) and rotate q and k, write k and v to their slots; return q.

        Args:
            qkv: (rows, (heads + 2 · kv_heads) · head_dim).
            step: where the rows go.
            rotation: of these rows.
            cache: of this layer, (blocks, 2, kv_heads, BLOCK_SIZE, head_dim).
            shape: of the heads.
            head_norms: weights (head_dim,) each, or None.
            eps: of those norms.

        Returns:
            (rows, heads, head_dim).
        """
        heads, kv_heads = shape.n_heads, shape.n_kv_heads
        split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, shape.head_dim).float()
        q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
        if head_norms is not None:
            q, k = _rms_norm(q, head_norms[0], eps), _rms_norm(k, head_norms[1], eps)
        q, k = rotate(q, rotation), rotate(k, rotation)
        slots = step.slots.long()
        block, place = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        cache[:, 0][block, :, place] = k.to(cache.dtype)
        cache[:, 1][block, :, place] = v.to(cache.dtype)
        return q.to(self.dtype)

    def attend(self, q: torch.Tensor, step: DeviceStep, cache: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
        """Causal attention over the paged keys of each row's sequence, the row's own included.

        Returns:
            (rows, heads · head_dim).
        """
        out = torch.empty_like(q)
        sizes = zip(step.firsts.tolist(), step.lengths.tolist(), step.starts.tolist(), step.tables, strict=True)
        for first, length, start, numbers in sizes:
            end = start + length
            table = numbers[: -(-end // BLOCK_SIZE)].long()
            keys, values = (cache[table, i].transpose(0, 1).flatten(1, 2)[:, :end].float() for i in (0, 1))
            rows = slice(first, first + length)
            out[rows] = attend_one(q[rows].float(), keys, values, end - length, shape).to(q.dtype)
        return out.flatten(1)

    def activate(self, gate_up: torch.Tensor, kind: Literal["silu", "gelu_tanh", "gelu"]) -> torch.Tensor:
        """``act(gate) · up`` of gate and up side by side: (rows, 2 · d_ff) -> (rows, d_ff)."""
        gate, up = gate_up.float().chunk(2, dim=1)
        acted = (
            functional.silu(gate)
            if kind == "silu"
            else functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
        )
        return (acted * up).to(gate_up.dtype)

    def routes(self, source: torch.Tensor, chosen: torch.Tensor, n_matrices: int) -> Routes:  # noqa: ARG002
        """Prepare products of rows `source` with matrices `chosen`, of which there are `n_matrices`."""
        return Routes(source, chosen)

    def grouped(self, x: torch.Tensor, matrix: Matrix, routes: Routes) -> torch.Tensor:
        """Product i is ``x[source[i]] @ matrix[chosen[i]].T``: (n, outputs), zero where nothing is chosen."""
        out = torch.zeros(routes.chosen.numel(), matrix.outputs, dtype=x.dtype, device=x.device)
        dense = expand(matrix, x.dtype)
        for number in routes.chosen.unique().tolist():
            if number >= 0:
                picked = torch.nonzero(routes.chosen == number).flatten()
                out[picked] = x[routes.source[picked]] @ dense[number].T
        return out

    def draw_plain(self, z: torch.Tensor, best: torch.Tensor, scale: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Draw by temperature alone: z f32 (n, vocab), its maxima f32, scales f64, random words int64 (n, 2) -> int64 (n,)."""
        return draw_weighted(integer_weights(z, best, scale), words)

    def apply_masks(self, z: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
        """Set what a bit mask excludes to -inf, in place: row ``rows[i]`` (int64) of z by ``masks[i]``, int32 (m, words)."""
        bits = (masks[:, :, None] >> torch.arange(32, device=z.device, dtype=torch.int32)) & 1
        z[rows] = z[rows].masked_fill(bits.flatten(1)[:, : z.shape[1]] == 0, float("-inf"))


def attend_one(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, shape: AttentionShape
) -> torch.Tensor:
    """Attention of one sequence's rows from position `start`: q (rows, heads, head_dim), keys (kv_heads, end, head_dim)."""
    group = shape.n_heads // shape.n_kv_heads
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    scores = soft_cap(torch.einsum("rhd,hkd->hrk", q * shape.scale, keys), shape.softcap)
    rows = start + torch.arange(q.shape[0], device=q.device)[:, None]
    seen = torch.arange(keys.shape[1], device=q.device)[None, :]
    visible = seen <= rows
    if shape.window:
        visible &= seen > rows - shape.window
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hrk,hkd->rhd", torch.softmax(scores, dim=-1), values)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the first 2 · half dimensions of (rows, heads, head_dim), f32."""
    half = rotation.cos.shape[1]
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (head[..., 0::2], head[..., 1::2]) if rotation.interleaved else head.split(half, dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(turned, dim=-1).flatten(-2) if rotation.interleaved else torch.cat(turned, dim=-1)
    return torch.cat([joined, rest], dim=-1)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap · tanh(x / cap)``; the identity for 0."""
    return cap * torch.tanh(x / cap) if cap else x


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
