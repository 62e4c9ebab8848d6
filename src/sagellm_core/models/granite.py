"""granite 3: llama with four multipliers."""

from __future__ import annotations

from sagellm_backend.spec import DecoderSpec
from sagellm_core.models.base import Family, gguf_slots, hf_slots
from sagellm_core.models.common import gguf_base, hf_base
from sagellm_core.models.views import Config, Metadata
from sagellm_protocol.errors import ModelFileError

__all__ = ["FAMILY"]


def _inverse(scale: float) -> float:
    """Logits are divided by the stored value."""
    if scale <= 0:
        raise ModelFileError(f"granite divides its logits by {scale}: the file is malformed")
    return 1.0 / scale


def _gguf(meta: Metadata) -> DecoderSpec:
    return gguf_base(
        meta,
        layout="interleaved",
        embed_scale=meta.number("embedding_scale", 1.0),
        residual_scale=meta.number("residual_scale", 1.0),
        logit_scale=_inverse(meta.number("logit_scale", 1.0)),
    )


def _hf(config: Config) -> DecoderSpec:
    bias = config.flag("attention_bias", False)
    return hf_base(
        config,
        embed_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        attention_scale=config.number("attention_multiplier", 1.0),
        logit_scale=_inverse(config.number("logits_scaling", 1.0)),
        qkv_bias=bias,
        o_bias=bias,
    )


FAMILY = Family("granite", ("granite",), ("granite",), _gguf, _hf, gguf_slots, hf_slots)
