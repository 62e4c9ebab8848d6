"""qwen 2 and 2.5 (biases on Q, K and V), qwen 3 (norm of each head), qwen 3 with experts."""

from __future__ import annotations

from sagellm_backend.spec import DecoderSpec, ExpertSpec
from sagellm_core.models.base import Family, gguf_slots, hf_slots
from sagellm_core.models.common import all_layers, gguf_base, hf_base, hf_windows
from sagellm_core.models.views import Config, Metadata

__all__ = ["QWEN2", "QWEN3", "QWEN3_MOE"]


def _gguf_2(meta: Metadata) -> DecoderSpec:
    return gguf_base(meta, layout="half", qkv_bias=True)


def _hf_2(config: Config) -> DecoderSpec:
    windows = hf_windows(config, config.integer("num_hidden_layers"), default_on=False)
    return hf_base(config, qkv_bias=True, windows=windows)


def _gguf_3(meta: Metadata) -> DecoderSpec:
    return gguf_base(meta, layout="half", qk_norm="head")


def _hf_3(config: Config) -> DecoderSpec:
    bias = config.flag("attention_bias", False)
    windows = hf_windows(config, config.integer("num_hidden_layers"), default_on=False)
    return hf_base(
        config, head_dim=config.integer("head_dim", 128), qk_norm="head", qkv_bias=bias, o_bias=bias, windows=windows
    )


def _gguf_moe(meta: Metadata) -> DecoderSpec:
    experts = ExpertSpec(
        n_experts=meta.integer("expert_count"),
        top_k=meta.integer("expert_used_count"),
        d_ff=meta.integer("expert_feed_forward_length"),
        normalize=meta.flag("expert_weights_norm", True),
    )
    layers = tuple(i for i in all_layers(meta.integer("block_count")) if f"blk.{i}.ffn_gate_inp.weight" in meta.shapes)
    return gguf_base(meta, layout="half", qk_norm="head", experts=experts, expert_layers=layers)


def _hf_moe(config: Config) -> DecoderSpec:
    experts = ExpertSpec(
        n_experts=config.integer("num_experts", config.integer("num_local_experts", 0)),
        top_k=config.integer("num_experts_per_tok"),
        d_ff=config.integer("moe_intermediate_size"),
        normalize=config.flag("norm_topk_prob", False),
    )
    step = max(config.integer("decoder_sparse_step", 1), 1)
    dense = set(config.items("mlp_only_layers") or ())
    layers = tuple(i for i in all_layers(config.integer("num_hidden_layers")) if i not in dense and (i + 1) % step == 0)
    bias = config.flag("attention_bias", False)
    return hf_base(
        config,
        head_dim=config.integer("head_dim", 128),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        experts=experts,
        expert_layers=layers,
        windows=hf_windows(config, config.integer("num_hidden_layers"), default_on=False),
    )


QWEN2 = Family("qwen2", ("qwen2",), ("qwen2",), _gguf_2, _hf_2, gguf_slots, hf_slots)
QWEN3 = Family("qwen3", ("qwen3",), ("qwen3",), _gguf_3, _hf_3, gguf_slots, hf_slots)
QWEN3_MOE = Family("qwen3-moe", ("qwen3moe",), ("qwen3_moe",), _gguf_moe, _hf_moe, gguf_slots, hf_slots)
