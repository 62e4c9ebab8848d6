"""One forward pass of a `DecoderSpec`, read aloud; the operations are `TorchOps` or `TritonOps`."""

from __future__ import annotations

from dataclasses import replace

import torch

from sagellm_backend.cuda.adapters import AdapterRows
from sagellm_backend.cuda.kv import CudaKV
from sagellm_backend.cuda.matrix import Matrix
from sagellm_backend.cuda.ops import AttentionShape, Rotation, Routes, TorchOps, soft_cap
from sagellm_backend.cuda.plan import DeviceStep
from sagellm_backend.cuda.weights import WeightSet
from sagellm_backend.spec import DecoderSpec, RopeSpec

__all__ = ["Forward", "Rotations", "shape_logits"]


class Forward:
    """A model whose weights are on the device.

    Args:
        spec: the model.
        weights: its weights.
        kv: its cache.
        ops: the operations.
    """

    def __init__(self, spec: DecoderSpec, weights: WeightSet, kv: CudaKV, ops: TorchOps) -> None:
        self._spec, self._weights, self._kv, self._ops = spec, weights, kv, ops
        self._rotations = Rotations(spec, ops, weights.embed.data.device)

    def hidden(self, step: DeviceStep, adapters: AdapterRows | None = None) -> torch.Tensor:
        """Run all layers, write the rows' KV; return the final-norm state of the logit rows, (n, d_model)."""
        spec, ops = self._spec, self._ops
        rotations = self._rotations.of(step.positions)
        x = ops.embed(self._weights.embed, step.tokens, spec.embed_scale)
        x, h = self._join(x, None, None, "0.attn_norm")
        for layer in range(spec.n_layers):
            branch = self._attention(layer, h, step, rotations[layer], adapters)
            x, h = self._join(x, branch, f"{layer}.post_attn_norm", f"{layer}.ffn_norm")
            branch = self._feed_forward(layer, h, adapters)
            x, h = self._join(x, branch, f"{layer}.post_ffn_norm", f"{layer + 1}.attn_norm")
        return self._join(x[step.logit_rows.long()], None, None, "final_norm")[1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, d_model) -> f32 (n, vocab)."""
        return shape_logits(self._spec, self._ops.matmul(hidden, self._weights.head, exact=True))

    def _join(
        self, x: torch.Tensor, branch: torch.Tensor | None, post: str | None, norm: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a branch to the residual stream and norm the sum, each with the norm of that name if there is one."""
        vectors = self._weights.vectors
        post_weight = None if post is None else vectors.get(post)
        return self._ops.residual_norm(
            x, branch, post_weight, vectors.get(norm), self._spec.norm_eps, self._spec.residual_scale
        )

    def _linear(self, name: str, x: torch.Tensor, adapters: AdapterRows | None) -> torch.Tensor:
        projection = self._weights.projections[name]
        out = self._ops.linear(x, projection)
        return out if adapters is None else adapters.add(self._ops, projection, x, out)

    def _attention(
        self, layer: int, h: torch.Tensor, step: DeviceStep, rotation: Rotation, adapters: AdapterRows | None
    ) -> torch.Tensor:
        spec, cache = self._spec, self._kv.layer(layer)
        shape = AttentionShape(
            spec.n_heads,
            spec.n_kv_heads,
            spec.head_dim,
            spec.attention_scale,
            spec.window(layer),
            spec.attention_softcap,
        )
        qkv = self._linear(f"{layer}.qkv", h, adapters)
        norms = None
        if spec.qk_norm != "none":
            norms = (self._weights.vectors[f"{layer}.q_norm"], self._weights.vectors[f"{layer}.k_norm"])
        if spec.qk_norm == "full" and norms is not None:
            qkv, norms = self._norm_full(qkv, norms), None
        q = self._ops.rotate_and_store(qkv, step, rotation, cache, shape, norms, spec.norm_eps)
        return self._linear(f"{layer}.o", self._ops.attend(q, step, cache, shape), adapters)

    def _norm_full(self, qkv: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Norm the whole projections of q and of k."""
        spec = self._spec
        q, k, v = qkv.split([s * spec.head_dim for s in (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)], dim=1)
        q, k = (self._ops.norm(part.contiguous(), w, spec.norm_eps) for part, w in zip((q, k), norms, strict=True))
        return torch.cat([q, k, v], dim=1)

    def _feed_forward(self, layer: int, h: torch.Tensor, adapters: AdapterRows | None) -> torch.Tensor:
        if f"{layer}.router" in self._weights.projections:
            return self._experts(layer, h)
        gate_up = self._linear(f"{layer}.gate_up", h, adapters)
        return self._linear(f"{layer}.down", self._ops.activate(gate_up, self._spec.activation), adapters)

    def _experts(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """Mixture of experts: each row's products with its own `top_k` experts, added by their shares."""
        experts, projections, ops = self._spec.experts, self._weights.projections, self._ops
        assert experts is not None
        (router,) = projections[f"{layer}.router"].parts
        logits = ops.matmul(h, router, exact=True)
        ordered, chosen = torch.sort(logits, dim=1, descending=True, stable=True)  # ties by lower number
        shares = torch.softmax(ordered, dim=1)[:, : experts.top_k]
        if experts.normalize:
            shares = shares / shares.sum(dim=1, keepdim=True)
        product = torch.arange(h.shape[0] * experts.top_k, device=h.device)
        routes = ops.routes(product // experts.top_k, chosen[:, : experts.top_k].flatten(), experts.n_experts)
        gate_up = _grouped(ops, h, projections[f"{layer}.experts.gate_up"].parts, routes)
        inner = ops.activate(gate_up, self._spec.activation)
        out = _grouped(ops, inner, projections[f"{layer}.experts.down"].parts, replace(routes, source=product))
        return (out.view(h.shape[0], experts.top_k, -1).float() * shares[:, :, None]).sum(dim=1).to(h.dtype)


class Rotations:
    """Angles of a model's layers, in float64 as the reference has them.

    Args:
        spec: the model.
        ops: the operations.
        device: where.
    """

    def __init__(self, spec: DecoderSpec, ops: TorchOps, device: torch.device) -> None:
        self._spec, self._ops = spec, ops
        ropes = [spec.rope] if spec.rope_local is None else [spec.rope, spec.rope_local]
        self._ropes = [(rope, _frequencies(rope, device)) for rope in ropes]

    def of(self, positions: torch.Tensor) -> list[Rotation]:
        """Return each layer's rotation of rows at `positions`, int32 (rows,)."""
        turned = {}
        for rope, frequencies in self._ropes:
            cos, sin = self._ops.angles(positions, frequencies, rope.magnitude_scale)
            turned[rope] = Rotation(cos, sin, rope.layout == "interleaved")
        return [turned[self._spec.rope_of(layer)] for layer in range(self._spec.n_layers)]


def shape_logits(spec: DecoderSpec, logits: torch.Tensor) -> torch.Tensor:
    """Scale and cap the head's products."""
    return soft_cap(logits if spec.logit_scale == 1.0 else logits * spec.logit_scale, spec.final_softcap)


def _grouped(ops: TorchOps, x: torch.Tensor, parts: tuple[Matrix, ...], routes: Routes) -> torch.Tensor:
    outs = [ops.grouped(x, part, routes) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _frequencies(rope: RopeSpec, device: torch.device) -> torch.Tensor:
    half = rope.dim // 2
    frequencies = rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if rope.inv_freq_factors is not None:
        frequencies = frequencies / torch.tensor(rope.inv_freq_factors, dtype=torch.float64)
    return (frequencies * rope.position_scale).to(device)
