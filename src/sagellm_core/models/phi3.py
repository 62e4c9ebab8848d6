"""phi 3 and 3.5, phi 4 mini: Q, K and V in one tensor, gate and up in one, longrope."""

from __future__ import annotations

from collections.abc import Collection

from sagellm_backend.spec import DecoderSpec
from sagellm_core.models.base import Family, Slots, Source, gguf_slots, hf_slots
from sagellm_core.models.common import all_layers, gguf_base, hf_base, hf_windows
from sagellm_core.models.views import Config, Metadata

__all__ = ["FAMILY"]


def _gguf(meta: Metadata) -> DecoderSpec:
    window = meta.integer("attention.sliding_window", 0)
    windows = tuple(window for _ in all_layers(meta.integer("block_count"))) if window else ()
    return gguf_base(meta, layout="half", windows=windows)


def _hf(config: Config) -> DecoderSpec:
    windows = hf_windows(config, config.integer("num_hidden_layers"))
    bias = config.flag("attention_bias", False)
    return hf_base(config, windows=windows, qkv_bias=bias, o_bias=bias)


def _split(slots: Slots, spec: DecoderSpec, qkv: str, gate_up: str) -> Slots:
    """Point q, k, v, gate and up of every layer at rows of the fused tensors."""
    q_rows, kv_rows = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    rows = {
        "q": (qkv, 0, q_rows),
        "k": (qkv, q_rows, q_rows + kv_rows),
        "v": (qkv, q_rows + kv_rows, q_rows + 2 * kv_rows),
        "gate": (gate_up, 0, spec.d_ff),
        "up": (gate_up, spec.d_ff, 2 * spec.d_ff),
    }
    for layer in range(spec.n_layers):
        for leaf, (name, start, stop) in rows.items():
            slots[f"{layer}.{leaf}"] = Source((name.replace("{layer}", str(layer)),), rows=(start, stop))
    return slots


def _gguf_slots(spec: DecoderSpec) -> Slots:
    return _split(gguf_slots(spec), spec, "blk.{layer}.attn_qkv.weight", "blk.{layer}.ffn_up.weight")


def _hf_slots(spec: DecoderSpec, names: Collection[str]) -> Slots:
    layer = "model.layers.{layer}."
    return _split(hf_slots(spec, names), spec, f"{layer}self_attn.qkv_proj.weight", f"{layer}mlp.gate_up_proj.weight")


FAMILY = Family("phi3", ("phi3",), ("phi3",), _gguf, _hf, _gguf_slots, _hf_slots)
