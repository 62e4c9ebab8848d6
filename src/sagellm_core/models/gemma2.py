"""gemma 2: norms before and after each branch, soft caps, every other layer windowed."""

from __future__ import annotations

import math

from sagellm_backend.spec import DecoderSpec
from sagellm_core.models.base import Family, gguf_slots
from sagellm_core.models.common import activation, all_layers, gguf_base, gguf_windows, hf_base, hf_windows
from sagellm_core.models.gemma3 import gemma_hf_slots
from sagellm_core.models.views import Config, Metadata

__all__ = ["FAMILY"]

_LAYERS_27B = 46  # its file does not say that it scales by d_model / heads


def _windows(window: int, n_layers: int) -> tuple[int, ...]:
    return tuple(0 if layer % 2 else window for layer in all_layers(n_layers))


def _gguf(meta: Metadata) -> DecoderSpec:
    n_layers, d_model = meta.integer("block_count"), meta.integer("embedding_length")
    changes: dict[str, float] = {}
    if n_layers == _LAYERS_27B:
        changes["attention_scale"] = math.sqrt(meta.integer("attention.head_count") / max(d_model, 1))
    return gguf_base(
        meta,
        layout="half",
        norm_placement="both",
        activation="gelu_tanh",
        embed_scale=math.sqrt(max(d_model, 1)),
        attention_softcap=meta.number("attn_logit_softcapping", 50.0),
        final_softcap=meta.number("final_logit_softcapping", 30.0),
        windows=gguf_windows(meta, meta.integer("attention.sliding_window", 4096), 2, n_layers),
        **changes,
    )


def _hf(config: Config) -> DecoderSpec:
    n_layers, d_model = config.integer("num_hidden_layers"), config.integer("hidden_size")
    windows = hf_windows(config, n_layers) if config.has("layer_types") else None
    return hf_base(
        config,
        head_dim=config.integer("head_dim", 256),
        norm_placement="both",
        activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        embed_scale=math.sqrt(max(d_model, 1)),
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=config.number("attn_logit_softcapping", 0.0),
        final_softcap=config.number("final_logit_softcapping", 0.0),
        windows=windows if windows is not None else _windows(config.integer("sliding_window", 4096), n_layers),
    )


FAMILY = Family("gemma2", ("gemma2",), ("gemma2",), _gguf, _hf, gguf_slots, gemma_hf_slots)
