"""Decode steps of one or two sequences in five launches a layer.

What is left of such a step's time, once the weights are read at the memory's rate, is launches.
"""

from __future__ import annotations

import torch

from sagellm_backend.cuda.forward import Rotations, shape_logits
from sagellm_backend.cuda.kernels import vector
from sagellm_backend.cuda.kernels.row_attention import RowAttention
from sagellm_backend.cuda.kv import CudaKV
from sagellm_backend.cuda.matrix import Matrix
from sagellm_backend.cuda.ops import TorchOps
from sagellm_backend.cuda.plan import DeviceStep
from sagellm_backend.cuda.weights import WeightSet
from sagellm_backend.spec import DecoderSpec

__all__ = ["SingleRows"]


class SingleRows:
    """A model whose norms stand before the blocks and whose matrices are plain numbers; see `serves`.

    Args:
        spec: the model.
        weights: its weights.
        kv: its cache.
        ops: the operations that it shares with larger steps.
        most_rows: of a step.
        early: launch each kernel while the one before it ends.
    """

    def __init__(
        self, spec: DecoderSpec, weights: WeightSet, kv: CudaKV, ops: TorchOps, most_rows: int, *, early: bool
    ) -> None:
        self._spec, self._weights, self._kv, self._ops, self._early = spec, weights, kv, ops, early
        device = weights.embed.data.device
        self._rotations = Rotations(spec, ops, device)
        self._attention = RowAttention(most_rows, spec.n_heads, spec.n_kv_heads, spec.head_dim, device, early=early)

    @staticmethod
    def serves(spec: DecoderSpec, weights: WeightSet) -> bool:
        """Whether it has all that the model needs."""
        matrices = [weights.head, *(part for each in weights.projections.values() for part in each.parts)]
        return (
            spec.norm_placement == "pre"
            and spec.qk_norm != "full"
            and spec.experts is None
            and all(matrix.kind == "dense" for matrix in matrices)
            and all(len(each.parts) == 1 for each in weights.projections.values())
        )

    def logits(self, step: DeviceStep) -> torch.Tensor:
        """Run a step that has one row a sequence and draws from each: write its KV, return f32 (rows, vocab)."""
        spec, weights, early = self._spec, self._weights, self._early
        rotations = self._rotations.of(step.positions)
        x = self._ops.embed(weights.embed, step.tokens, spec.embed_scale)
        for layer in range(spec.n_layers):
            qkv = vector.product(
                x, self._matrix(layer, "qkv").data, weights.dtype, gain=weights.vectors[f"{layer}.attn_norm"],
                bias=weights.projections[f"{layer}.qkv"].bias, eps=spec.norm_eps, early=early,
            )  # fmt: skip
            norms = None
            if spec.qk_norm == "head":
                norms = (weights.vectors[f"{layer}.q_norm"], weights.vectors[f"{layer}.k_norm"])
            attended = self._attention.attend(
                qkv, step, rotations[layer], self._kv.layer(layer), norms, spec.norm_eps,
                scale=spec.attention_scale, window=spec.window(layer), cap=spec.attention_softcap,
            )  # fmt: skip
            vector.add_product(
                x, attended, self._matrix(layer, "o").data, spec.residual_scale,
                bias=weights.projections[f"{layer}.o"].bias, early=early,
            )  # fmt: skip
            inner = vector.gated_product(
                x, self._matrix(layer, "gate_up").data, weights.vectors[f"{layer}.ffn_norm"], spec.activation,
                weights.dtype, eps=spec.norm_eps, early=early,
            )  # fmt: skip
            vector.add_product(x, inner, self._matrix(layer, "down").data, spec.residual_scale, early=early)
        logits = vector.product(
            x, weights.head.data, torch.float32, gain=weights.vectors["final_norm"], eps=spec.norm_eps, early=early
        )
        return shape_logits(spec, logits)

    def _matrix(self, layer: int, name: str) -> Matrix:
        (matrix,) = self._weights.projections[f"{layer}.{name}"].parts
        return matrix
