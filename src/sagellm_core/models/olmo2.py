"""olmo 2: norms on the output of each branch, and of the whole Q and K projection."""

from __future__ import annotations

from collections.abc import Collection

from sagellm_backend.spec import DecoderSpec
from sagellm_core.models.base import Family, Slots, gguf_slots, hf_slots
from sagellm_core.models.common import gguf_base, hf_base
from sagellm_core.models.views import Config, Metadata

__all__ = ["FAMILY"]

_NAMES = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}


def _gguf(meta: Metadata) -> DecoderSpec:
    return gguf_base(meta, layout="half", norm_placement="post", qk_norm="full")


def _hf(config: Config) -> DecoderSpec:
    bias = config.flag("attention_bias", False)
    return hf_base(config, norm_placement="post", qk_norm="full", qkv_bias=bias, o_bias=bias)


def _hf_slots(spec: DecoderSpec, names: Collection[str]) -> Slots:
    return hf_slots(spec, names, rename=_NAMES)


FAMILY = Family("olmo2", ("olmo2",), ("olmo2",), _gguf, _hf, gguf_slots, _hf_slots)
