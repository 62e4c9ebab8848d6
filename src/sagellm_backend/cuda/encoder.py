"""Every `EncoderSpec` on a GPU: products and attention by torch's own library, packed weights by our kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from sagellm_backend.cuda.device import on_device
from sagellm_backend.cuda.matrix import Matrix
from sagellm_backend.cuda.ops import TorchOps
from sagellm_backend.cuda.plan import send
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.weights import Loader, Projection
from sagellm_backend.encoder import EncodeBatch, EncoderSpec
from sagellm_backend.reference_encoder import check_encode_batch
from sagellm_backend.tensors import Weights
from sagellm_protocol.errors import ResourceExhaustedError

__all__ = ["CudaEncoder"]

Float32 = npt.NDArray[np.float32]

_ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the rows of a batch lie when every sequence has the length of the longest.

    Attributes:
        padded: int64 (rows,), place of each row among ``sequences · longest``.
        firsts, lengths: int64 (sequences,).
        mask: bool (sequences, longest), which places hold a row; None where all do.
    """

    longest: int
    padded: torch.Tensor
    firsts: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor | None


class CudaEncoder:
    """An encoder by torch and Triton; see `sagellm_backend.cuda.backend.CudaBackend`.

    Args:
        spec: the model.
        weights: its weights, in the file's precision.
        settings: how to run.
        quant: of `LoadOptions`.
    """

    def __init__(self, spec: EncoderSpec, weights: Weights, settings: CudaSettings, quant: str) -> None:
        self._spec, self._settings = spec, settings
        loader = Loader(spec, weights, settings, quant)
        self._ops = _make_ops(loader.dtype, settings)
        self._embed: Matrix | None = loader.matrix("embed")
        single = [slot for slot, shape in spec.slots().items() if len(shape) == 1 and "norm" in slot]
        tables = ["position_embed", *(["type_embed"] if spec.token_types else [])]
        self._small = {slot: loader.vector(slot) for slot in (*single, *tables)}
        names = [f"{layer}.{name}" for layer in range(spec.n_layers) for name in ("qkv", "o", "up", "down")]
        names += ["pool", "classify"] if spec.n_labels else []
        self._projections: dict[str, Projection] = {name: loader.projection(name) for name in names}
        self._weight_bytes = self._count()

    @property
    def spec(self) -> EncoderSpec:
        """What it executes."""
        return self._spec

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device."""
        return self._weight_bytes

    def close(self) -> None:
        """Free the device's memory. Idempotent."""
        self._embed, self._small, self._projections = None, {}, {}
        if self._settings.on_gpu:
            torch.cuda.empty_cache()

    def encode(self, batch: EncodeBatch) -> Float32:
        """Return (sequences, d_model) or (sequences, n_labels).

        Raises:
            ValueError: the batch does not add up (see `check_encode_batch`).
            ResourceExhaustedError: the device has no room for a batch of this size.
            RuntimeError: the encoder is closed.
        """
        if self._embed is None:
            raise RuntimeError("the runner is closed")
        check_encode_batch(batch, self._spec)
        if not batch.lengths.size:
            return np.empty((0, self._spec.n_labels if batch.output == "labels" else self._spec.d_model), np.float32)
        try:
            with torch.inference_mode(), on_device(self._settings):
                layout = _lay_out(batch.lengths, self._settings.device)
                x = self._hidden(batch, layout, self._embed)
                out: Float32 = self._pool(batch.output, x, layout).float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise ResourceExhaustedError(
                f"{batch.lengths.size} inputs of up to {batch.lengths.max()} tokens do not fit on the device beside "
                f"{self._weight_bytes >> 20} MiB of weights: send fewer at once"
            ) from error
        return out

    def _hidden(self, batch: EncodeBatch, layout: _Layout, embed: Matrix) -> torch.Tensor:
        """Final hidden states, f32 (rows, d_model)."""
        spec, ops, device = self._spec, self._ops, self._settings.device
        positions = np.concatenate([np.arange(n) for n in batch.lengths]) + spec.position_offset
        x = ops.embed(embed, send(np.asarray(batch.token_ids, np.int32), device), 1.0)
        x = x + self._small["position_embed"][send(positions, device)]
        if spec.token_types:
            kinds = np.zeros_like(batch.token_ids) if batch.token_types is None else batch.token_types
            x = x + self._small["type_embed"][send(kinds.astype(np.int64), device)]
        x = self._norm("embed_norm", x)
        for layer in range(spec.n_layers):
            qkv = ops.linear(x.to(ops.dtype), self._projections[f"{layer}.qkv"])
            attended = ops.linear(self._attend(qkv, layout), self._projections[f"{layer}.o"])
            x = self._norm(f"{layer}.attn_norm", x + attended.float())
            inner = ops.linear(x.to(ops.dtype), self._projections[f"{layer}.up"])
            inner = ops.linear(_ACTIVATIONS[spec.activation](inner), self._projections[f"{layer}.down"])
            x = self._norm(f"{layer}.ffn_norm", x + inner.float())
        return x

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._small[name], self._small[f"{name}_bias"]
        return functional.layer_norm(x, (self._spec.d_model,), weight, bias, self._spec.norm_eps)

    def _attend(self, qkv: torch.Tensor, layout: _Layout) -> torch.Tensor:
        """Each row sees all rows of its sequence: (rows, 3 · d_model) -> (rows, d_model)."""
        d, heads, count = self._spec.d_model, self._spec.n_heads, layout.lengths.numel()
        padded = qkv.new_zeros(count * layout.longest, 3 * d)
        padded[layout.padded] = qkv
        q, k, v = padded.view(count, layout.longest, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        mask = None if layout.mask is None else layout.mask[:, None, None]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / math.sqrt(d // heads))
        return out.transpose(1, 2).reshape(-1, d)[layout.padded]

    def _pool(self, output: str, x: torch.Tensor, layout: _Layout) -> torch.Tensor:
        if output == "mean":
            padded = x.new_zeros(layout.lengths.numel() * layout.longest, x.shape[1])
            padded[layout.padded] = x
            return padded.view(-1, layout.longest, x.shape[1]).sum(dim=1) / layout.lengths[:, None]
        if output == "last":
            return x[layout.firsts + layout.lengths - 1]
        first = x[layout.firsts]
        if output == "cls":
            return first
        pooled = torch.tanh(self._ops.linear(first.to(self._ops.dtype), self._projections["pool"]))
        return self._ops.linear(pooled, self._projections["classify"])

    def _count(self) -> int:
        assert self._embed is not None
        parts = [self._embed, *(part for each in self._projections.values() for part in each.parts)]
        vectors = [*self._small.values(), *(p.bias for p in self._projections.values() if p.bias is not None)]
        return sum(part.nbytes for part in parts) + sum(int(v.numel() * v.element_size()) for v in vectors)


def _lay_out(lengths: npt.NDArray[np.int32], device: str) -> _Layout:
    longest = int(lengths.max())
    held = np.arange(longest) < lengths[:, None]
    firsts = np.cumsum(lengths, dtype=np.int64) - lengths
    return _Layout(
        longest=longest,
        padded=send(np.flatnonzero(held), device),
        firsts=send(firsts, device),
        lengths=send(lengths.astype(np.int64), device),
        mask=None if held.all() else send(held, device),
    )


def _make_ops(dtype: torch.dtype, settings: CudaSettings) -> TorchOps:
    if not settings.triton:
        return TorchOps(dtype)
    from sagellm_backend.cuda.triton_ops import TritonOps

    return TritonOps(dtype, 1, invariant=settings.invariant)
