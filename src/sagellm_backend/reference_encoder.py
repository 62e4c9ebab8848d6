"""Every `EncoderSpec` in readable numpy, float32."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sagellm_backend.encoder import EncodeBatch, EncoderSpec
from sagellm_backend.reference_ops import Tiling, activate, layer_norm, softmax

__all__ = ["ReferenceEncoder", "check_encode_batch"]

Float32 = npt.NDArray[np.float32]


def check_encode_batch(batch: EncodeBatch, spec: EncoderSpec) -> None:
    """Check that a batch adds up and stays inside the vocabulary and the context.

    Raises:
        ValueError: the first thing that is wrong, with its numbers.
    """
    ids, lengths, types = batch.token_ids, batch.lengths, batch.token_types
    if ids.size != int(lengths.sum()) or (lengths.size and lengths.min() < 1):
        raise ValueError(f"{ids.size} token ids for lengths {lengths.tolist()}: they must be positive and sum to it")
    if ids.size and (ids.min() < 0 or ids.max() >= spec.vocab_size):
        raise ValueError(f"a token id lies outside the vocabulary of {spec.vocab_size}")
    if lengths.size and lengths.max() > spec.context_length:
        raise ValueError(f"an input of {lengths.max()} tokens is above the context of {spec.context_length}")
    if types is not None and (types.size != ids.size or types.min() < 0 or types.max() >= max(1, spec.token_types)):
        raise ValueError(f"token types must be {ids.size} numbers below {max(1, spec.token_types)}")
    if batch.output == "labels" and not spec.n_labels:
        raise ValueError(f"{spec.architecture} has no classifier")


class ReferenceEncoder:
    """An encoder with float32 weights."""

    def __init__(self, spec: EncoderSpec, weights: dict[str, Float32]) -> None:
        self._spec = spec
        self._weights = weights

    @property
    def spec(self) -> EncoderSpec:
        """What it executes."""
        return self._spec

    @property
    def weight_bytes(self) -> int:
        """Bytes of the float32 weights."""
        return sum(array.nbytes for array in self._weights.values())

    def close(self) -> None:
        """Drop the weights."""
        self._weights = {}

    def encode(self, batch: EncodeBatch) -> Float32:
        """Return (sequences, d_model) or (sequences, n_labels).

        Raises:
            ValueError: the batch does not add up (see `check_encode_batch`).
            RuntimeError: the runner is closed.
        """
        if not self._weights:
            raise RuntimeError("the runner is closed")
        check_encode_batch(batch, self._spec)
        borders = [0, *np.cumsum(batch.lengths).tolist()]
        sequences = [slice(a, b) for a, b in pairwise(borders)]
        positions = np.concatenate([np.arange(n) for n in batch.lengths]) if sequences else np.empty(0, np.int64)
        tiling = Tiling(positions)
        x = self._embed(batch, positions)
        for layer in range(self._spec.n_layers):
            x = self._norm(f"{layer}.attn_norm", x + self._attention(layer, x, tiling, sequences))
            h = activate(self._linear(f"{layer}.up", x, tiling), self._spec.activation)
            x = self._norm(f"{layer}.ffn_norm", x + self._linear(f"{layer}.down", h, tiling))
        return self._pool(batch, x, sequences)

    def _embed(self, batch: EncodeBatch, positions: npt.NDArray[np.int64]) -> Float32:
        w, spec = self._weights, self._spec
        x = w["embed"][batch.token_ids] + w["position_embed"][positions + spec.position_offset]
        if spec.token_types:
            x = x + w["type_embed"][0 if batch.token_types is None else batch.token_types]
        return self._norm("embed_norm", x)

    def _norm(self, name: str, x: Float32) -> Float32:
        return layer_norm(x, self._weights[name], self._weights[f"{name}_bias"], self._spec.norm_eps)

    def _linear(self, name: str, x: Float32, tiling: Tiling) -> Float32:
        return tiling.linear(x, self._weights[name], self._weights[f"{name}_bias"])

    def _attention(self, layer: int, x: Float32, tiling: Tiling, sequences: list[slice]) -> Float32:
        spec = self._spec
        head_dim = spec.d_model // spec.n_heads
        q, k, v = (
            self._linear(f"{layer}.{name}", x, tiling).reshape(-1, spec.n_heads, head_dim) for name in ("q", "k", "v")
        )
        q = q * np.float32(1 / math.sqrt(head_dim))
        out = np.empty_like(q)
        for rows in sequences:
            scores = np.ascontiguousarray(q[rows].transpose(1, 0, 2)) @ np.ascontiguousarray(k[rows].transpose(1, 2, 0))
            attended = softmax(scores) @ np.ascontiguousarray(v[rows].transpose(1, 0, 2))
            out[rows] = attended.transpose(1, 0, 2)
        return self._linear(f"{layer}.o", out.reshape(x.shape), tiling)

    def _pool(self, batch: EncodeBatch, x: Float32, sequences: list[slice]) -> Float32:
        if not sequences:
            return np.empty((0, self._spec.n_labels if batch.output == "labels" else self._spec.d_model), np.float32)
        if batch.output == "mean":
            return np.stack([x[rows].mean(axis=0, dtype=np.float64).astype(np.float32) for rows in sequences])
        if batch.output == "last":
            return np.stack([x[rows.stop - 1] for rows in sequences])
        first = np.stack([x[rows.start] for rows in sequences])
        if batch.output == "cls":
            return first
        tiling = Tiling(np.zeros(len(sequences), np.int64))
        return self._linear("classify", activate(self._linear("pool", first, tiling), "tanh"), tiling)
