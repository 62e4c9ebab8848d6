"""Bidirectional encoders of the BERT family as data, and what a backend that runs them offers.

Weight slots, with shapes as (rows = outputs, columns = inputs); ``L`` is the layer number:

=====================================  =====================================  ===============================
slot                                   shape                                  when
=====================================  =====================================  ===============================
``embed``                              (vocab, d_model)                       always
``position_embed``                     (positions, d_model)                   always
``type_embed``                         (token_types, d_model)                 `token_types` > 0
``embed_norm`` ``embed_norm_bias``     (d_model,)                             always
``L.q`` ``.k`` ``.v`` ``.o``           (d_model, d_model)                     always, each with ``_bias``
``L.attn_norm`` ``L.ffn_norm``         (d_model,)                             always, each with ``_bias``
``L.up`` ``L.down``                    (d_ff, d_model), (d_model, d_ff)       always, each with ``_bias``
``pool`` ``pool_bias``                 (d_model, d_model), (d_model,)         `n_labels` > 0
``classify`` ``classify_bias``         (n_labels, d_model), (n_labels,)       `n_labels` > 0
=====================================  =====================================  ===============================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from sagellm_backend.base import LoadOptions
from sagellm_backend.tensors import Weights

__all__ = ["EncodeBatch", "EncodeOutput", "EncoderBackend", "EncoderRunner", "EncoderSpec"]

EncodeOutput = Literal["mean", "cls", "last", "labels"]
"""What an encoder gives for each input; see `EncodeBatch`."""

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


class EncoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An encoder with absolute positions and post-norm (Devlin et al., 2019).

    Attributes:
        architecture: name of the family, for people.
        n_layers, d_model, n_heads, d_ff, vocab_size: sizes.
        context_length: most tokens of one input.
        n_positions: rows of ``position_embed``.
        position_offset: position of the first token (roberta: 2).
        token_types: segments; 0 has no ``type_embed``.
        norm_eps: of every layer norm.
        activation: of the feed-forward.
        pooling: what embeddings of this model are made of.
        normalize: whether they are scaled to length 1.
        n_labels: outputs of the classifier over the first token; 0 has none.
    """

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    vocab_size: int
    context_length: int
    n_positions: int
    norm_eps: float
    position_offset: int = 0
    token_types: int = 2
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    pooling: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = True
    n_labels: int = 0

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Every weight slot that this spec needs, with its shape."""
        d, f = self.d_model, self.d_ff
        out: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, d), "position_embed": (self.n_positions, d)}
        if self.token_types:
            out["type_embed"] = (self.token_types, d)
        out |= {"embed_norm": (d,), "embed_norm_bias": (d,)}
        for layer in range(self.n_layers):
            for name, shape in {
                "q": (d, d),
                "k": (d, d),
                "v": (d, d),
                "o": (d, d),
                "up": (f, d),
                "down": (d, f),
            }.items():
                out |= {f"{layer}.{name}": shape, f"{layer}.{name}_bias": shape[:1]}
            for name in ("attn_norm", "ffn_norm"):
                out |= {f"{layer}.{name}": (d,), f"{layer}.{name}_bias": (d,)}
        if self.n_labels:
            out |= {
                "pool": (d, d),
                "pool_bias": (d,),
                "classify": (self.n_labels, d),
                "classify_bias": (self.n_labels,),
            }
        return out


@dataclass(frozen=True, slots=True)
class EncodeBatch:
    """Whole sequences, one after another.

    Attributes:
        token_ids: int32[rows].
        token_types: int32[rows], or None for all zero.
        lengths: int32[sequences], each at least 1; they sum to `rows`.
        output: ``mean``, ``cls`` and ``last`` pool the final hidden states, ``labels`` gives the classifier's logits.
    """

    token_ids: Int32
    lengths: Int32
    output: EncodeOutput
    token_types: Int32 | None = None


@runtime_checkable
class EncoderRunner(Protocol):
    """An encoder on a device."""

    @property
    def spec(self) -> EncoderSpec:
        """What it executes."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they lie on the device."""
        ...

    def encode(self, batch: EncodeBatch) -> Float32:
        """Return (sequences, d_model) or (sequences, n_labels), not normalised.

        A sequence's result is a function of that sequence only.

        Raises:
            ValueError: the batch does not add up, or the spec lacks the output.
        """
        ...

    def close(self) -> None:
        """Free the device's memory. Idempotent."""
        ...


@runtime_checkable
class EncoderBackend(Protocol):
    """What a `Backend` that runs encoders offers besides its other methods."""

    def load_encoder(self, spec: EncoderSpec, weights: Weights, options: LoadOptions) -> EncoderRunner:
        """Place an encoder on the device; of `options`, `n_blocks` and `kv_dtype` do not matter.

        Raises:
            ValueError: a slot of `spec.slots()` is missing in `weights` or has another shape; the message names it.
            UnsupportedError: the options ask for a precision that this backend lacks.
        """
        ...
