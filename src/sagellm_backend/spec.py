"""A model family as data. `sagellm_core.models` maps file metadata to a spec; every backend executes any spec.

Weight slots, with shapes as (rows = outputs, columns = inputs); ``L`` is the layer number:

====================================  =========================================  =====================================
slot                                  shape                                      when
====================================  =========================================  =====================================
``embed``                             (vocab, d_model)                           always
``head``                              (vocab, d_model)                           unless `tied_head`
``final_norm``                        (d_model,)                                 always
``L.attn_norm`` ``L.ffn_norm``        (d_model,)                                 `norm_placement` pre or both
``L.post_attn_norm`` ``.post_ffn_norm``  (d_model,)                              `norm_placement` post or both
``L.q`` ``L.k`` ``L.v``               (heads·head_dim, d_model), (kv_heads·…)    always
``L.q_bias`` ``L.k_bias`` ``L.v_bias``  (heads·head_dim,) …                      `qkv_bias`
``L.o`` ``L.o_bias``                  (d_model, heads·head_dim)                  always; bias with `o_bias`
``L.q_norm`` ``L.k_norm``             (head_dim,) or (heads·head_dim,)           `qk_norm` head or full
``L.gate`` ``L.up`` ``L.down``        (d_ff, d_model) ×2, (d_model, d_ff)        dense layers
``L.router``                          (n_experts, d_model)                       expert layers
``L.experts.gate`` ``.up`` ``.down``  (n_experts, d_ff, d_model) …               expert layers
====================================  =========================================  =====================================
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["DecoderSpec", "ExpertSpec", "RopeSpec"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding (Su et al., 2021).

    Attributes:
        theta: base of the geometric frequencies.
        dim: rotated dimensions of each head, from the first; at most head_dim.
        layout: ``half`` pairs (i, i + dim/2), as in safetensors; ``interleaved`` pairs (2i, 2i + 1), as in GGUF files of
            the llama family, whose Q and K rows are permuted.
        inv_freq_factors: a divisor for each of the dim/2 frequencies (llama3, longrope), or None.
        position_scale: positions are multiplied by it (linear scaling: 1/factor).
        magnitude_scale: cos and sin are multiplied by it (yarn, longrope).
    """

    theta: float
    dim: int
    layout: Literal["half", "interleaved"] = "half"
    inv_freq_factors: tuple[float, ...] | None = None
    position_scale: float = 1.0
    magnitude_scale: float = 1.0


class ExpertSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Mixture of experts: softmax router over `n_experts`, `top_k` of them run.

    `normalize` makes the chosen weights sum to 1 (mixtral always does: softmax over the chosen).
    """

    n_experts: int
    top_k: int
    d_ff: int
    normalize: bool = True


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer.

    Attributes:
        architecture: name of the family, for people.
        n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size: sizes.
        context_length: positions that the model was made for.
        norm_eps: of every RMSNorm. Weights are plain factors (a loader adds gemma's 1 where a file lacks it).
        norm_placement: ``pre`` (llama), ``post`` (olmo2: on the branch's output, before the residual) or ``both`` (gemma2/3).
        qk_norm: RMSNorm on q and k before the rotation: ``head`` (each head alone) or ``full`` (the whole projection).
        activation: of the gate.
        rope: for full-attention layers, and for all when `rope_local` is None.
        rope_local: for windowed layers (gemma3).
        windows: for each layer the attention window in tokens (a token sees itself and window - 1 before it); 0 is full.
        attention_scale: factor of q·k (1/sqrt(head_dim) in most families).
        attention_softcap, final_softcap: c·tanh(x/c); 0 is off.
        embed_scale, residual_scale, logit_scale: factors; logits are multiplied by `logit_scale`.
        tied_head: logits use `embed`.
        experts: in the layers of `expert_layers`, or None.
    """

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeSpec
    attention_scale: float
    rope_local: RopeSpec | None = None
    norm_placement: Literal["pre", "post", "both"] = "pre"
    qk_norm: Literal["none", "head", "full"] = "none"
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    windows: tuple[int, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tied_head: bool = False
    experts: ExpertSpec | None = None
    expert_layers: tuple[int, ...] = ()

    def window(self, layer: int) -> int:
        """Attention window of `layer` in tokens; 0 is full attention."""
        return self.windows[layer] if self.windows else 0

    def rope_of(self, layer: int) -> RopeSpec:
        """Rotation of `layer`."""
        return self.rope_local if self.rope_local is not None and self.window(layer) else self.rope

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Every weight slot that this spec needs, with its shape."""
        d, dh = self.d_model, self.head_dim
        out: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, d), "final_norm": (d,)}
        if not self.tied_head:
            out["head"] = (self.vocab_size, d)
        for layer in range(self.n_layers):
            out.update({f"{layer}.{name}": shape for name, shape in self._layer_slots(layer, d, dh).items()})
        return out

    def _layer_slots(self, layer: int, d: int, dh: int) -> dict[str, tuple[int, ...]]:
        q_rows, kv_rows = self.n_heads * dh, self.n_kv_heads * dh
        out: dict[str, tuple[int, ...]] = {"q": (q_rows, d), "k": (kv_rows, d), "v": (kv_rows, d), "o": (d, q_rows)}
        if self.norm_placement in ("pre", "both"):
            out |= {"attn_norm": (d,), "ffn_norm": (d,)}
        if self.norm_placement in ("post", "both"):
            out |= {"post_attn_norm": (d,), "post_ffn_norm": (d,)}
        if self.qk_norm != "none":
            full = self.qk_norm == "full"
            out |= {"q_norm": (q_rows if full else dh,), "k_norm": (kv_rows if full else dh,)}
        if self.qkv_bias:
            out |= {"q_bias": (q_rows,), "k_bias": (kv_rows,), "v_bias": (kv_rows,)}
        if self.o_bias:
            out["o_bias"] = (d,)
        if self.experts is not None and layer in self.expert_layers:
            e, f = self.experts.n_experts, self.experts.d_ff
            out |= {"router": (e, d), "experts.gate": (e, f, d), "experts.up": (e, f, d), "experts.down": (e, d, f)}
        else:
            out |= {"gate": (self.d_ff, d), "up": (self.d_ff, d), "down": (d, self.d_ff)}
        return out
