"""llama and what is shaped like it: mistral, smollm, tinyllama, and mixtral in GGUF files (which call it llama)."""

from __future__ import annotations

from sagellm_backend.spec import DecoderSpec, ExpertSpec
from sagellm_core.models.base import Family, gguf_slots, hf_slots
from sagellm_core.models.common import all_layers, gguf_base, hf_base, hf_windows
from sagellm_core.models.views import Config, Metadata

__all__ = ["FAMILY"]


def _gguf(meta: Metadata) -> DecoderSpec:
    # llama.cpp's converter permutes the rows of Q and K, so that rotation pairs are neighbours.
    n_experts = meta.integer("expert_count", 0)
    if not n_experts:
        has_bias = "blk.0.attn_q.bias" in meta.shapes
        return gguf_base(meta, layout="interleaved", qkv_bias=has_bias)
    experts = ExpertSpec(
        n_experts=n_experts, top_k=meta.integer("expert_used_count"), d_ff=meta.integer("feed_forward_length")
    )
    layers = all_layers(meta.integer("block_count"))
    return gguf_base(meta, layout="interleaved", experts=experts, expert_layers=layers)


def _hf(config: Config) -> DecoderSpec:
    windows = hf_windows(config, config.integer("num_hidden_layers")) if config.text("model_type") == "mistral" else ()
    bias = config.flag("attention_bias", False)
    return hf_base(config, windows=windows, qkv_bias=bias, o_bias=bias)


FAMILY = Family("llama", ("llama",), ("llama", "mistral"), _gguf, _hf, gguf_slots, hf_slots)
