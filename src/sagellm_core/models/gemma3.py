"""gemma 3 (text): norms before and after each branch, norm of each head, five windowed layers to one that sees all."""

from __future__ import annotations

import math
from collections.abc import Collection

from sagellm_backend.spec import DecoderSpec, RopeSpec
from sagellm_core.models.base import Family, Slots, gguf_slots, hf_slots
from sagellm_core.models.common import activation, all_layers, gguf_base, gguf_windows, hf_base, hf_windows
from sagellm_core.models.rope import hf_rope
from sagellm_core.models.views import Config, Metadata

__all__ = ["FAMILY", "GEMMA_NAMES", "gemma_hf_slots"]

GEMMA_NAMES = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}
_PATTERN = 6
_LOCAL_THETA = 10000.0
_LAYERS_27B = 62  # its file does not say that it scales by d_model / heads


def _windows(window: int, n_layers: int, pattern: int) -> tuple[int, ...]:
    return tuple(0 if pattern > 0 and (layer + 1) % pattern == 0 else window for layer in all_layers(n_layers))


def _gguf(meta: Metadata) -> DecoderSpec:
    n_layers, d_model = meta.integer("block_count"), meta.integer("embedding_length")
    spec = gguf_base(
        meta,
        layout="half",
        norm_placement="both",
        qk_norm="head",
        activation="gelu_tanh",
        embed_scale=math.sqrt(max(d_model, 1)),
        final_softcap=meta.number("final_logit_softcapping", 0.0),
        windows=gguf_windows(meta, meta.integer("attention.sliding_window"), _PATTERN, n_layers),
    )
    theta = meta.number("rope.freq_base_swa", _LOCAL_THETA)
    local = RopeSpec(theta=theta, dim=spec.rope.dim)
    scale = math.sqrt(spec.n_heads / d_model) if n_layers == _LAYERS_27B else spec.attention_scale
    return _replace(spec, rope_local=local, attention_scale=scale)


def _hf(config: Config) -> DecoderSpec:
    n_layers, d_model = config.integer("num_hidden_layers"), config.integer("hidden_size")
    head_dim = config.integer("head_dim", 256)
    both = config.table("rope_parameters")
    full = both.table("full_attention") if both else None
    sliding = both.table("sliding_attention") if both else None
    theta = config.number("rope_local_base_freq", _LOCAL_THETA)
    local = hf_rope(Config({}), head_dim, params=sliding) if sliding else RopeSpec(theta=theta, dim=head_dim)
    windows = hf_windows(config, n_layers) if config.has("layer_types") else None
    if windows is None:
        pattern = config.integer("sliding_window_pattern", _PATTERN)
        windows = _windows(config.integer("sliding_window", 4096), n_layers, pattern)
    return hf_base(
        config,
        n_heads=config.integer("num_attention_heads"),
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        norm_placement="both",
        qk_norm="head",
        activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        embed_scale=math.sqrt(max(d_model, 1)),
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=config.number("attn_logit_softcapping", 0.0),
        final_softcap=config.number("final_logit_softcapping", 0.0),
        windows=windows,
        rope=hf_rope(config, head_dim, params=full, theta=1e6),
        rope_local=local,
    )


def gemma_hf_slots(spec: DecoderSpec, names: Collection[str]) -> Slots:
    """Return gemma's slots: norm weights are stored minus 1 in safetensors (and not so in GGUF files)."""
    return hf_slots(spec, names, rename=GEMMA_NAMES, plus_one=True)


def _replace(spec: DecoderSpec, **changes: object) -> DecoderSpec:
    import msgspec

    return msgspec.structs.replace(spec, **changes)


FAMILY = Family("gemma3", ("gemma3",), ("gemma3_text", "gemma3"), _gguf, _hf, gguf_slots, gemma_hf_slots)
