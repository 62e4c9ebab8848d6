"""Rotary scaling of config.json and of GGUF metadata -> `RopeSpec`: a divisor for each frequency.

linear (kaiokendev, 2023), llama3 (Meta, 2024), yarn (Peng et al., 2023), longrope (Ding et al., 2024).
"""

from __future__ import annotations

import math
from typing import Literal

from sagellm_backend.spec import RopeSpec
from sagellm_core.models.views import Config, Metadata
from sagellm_protocol.errors import ModelFileError

__all__ = ["gguf_rope", "hf_rope", "llama3_factors", "yarn_factors"]

Layout = Literal["half", "interleaved"]


def llama3_factors(
    theta: float, dim: int, *, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Return llama3's divisors: long wavelengths by `factor`, short ones by 1, a ramp between."""
    out = []
    for i in range(dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / dim)
        ramp = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        out.append(1.0 / ((1.0 - ramp) / factor + ramp))
    return tuple(out)


def yarn_factors(
    theta: float, dim: int, *, factor: float, original: int, fast: float, slow: float
) -> tuple[float, ...]:
    """Return yarn's divisors: a ramp over the dimensions between `fast` and `slow` rotations of the original context."""

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), dim - 1)
    out = []
    for i in range(dim // 2):
        ramp = min(1.0, max(0.0, (i - low) / max(high - low, 1e-3)))
        out.append(1.0 / (ramp / factor + (1.0 - ramp)))
    return tuple(out)


def hf_rope(config: Config, head_dim: int, *, params: Config | None = None, theta: float = 10000.0) -> RopeSpec:
    """Return the rotation that config.json describes, in its old form (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

    Args:
        config: of the text model.
        head_dim: width of a head.
        params: the rotation's own parameters, where a config has several.
        theta: the family's default base.

    Raises:
        ModelFileError: a scaling that is not supported, or malformed numbers.
    """
    params = params or config.table("rope_parameters") or config.table("rope_scaling") or Config({})
    theta = params.number("rope_theta", config.number("rope_theta", theta))
    partial = params.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * partial)
    kind = params.text("rope_type", params.text("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta, dim=dim)
    if kind in ("longrope", "su"):
        return _hf_longrope(config, params, theta, dim)
    factor = params.number("factor")
    if factor < 1:
        raise ModelFileError(f"config.json scales the rotation by {factor}, below 1: the model file is malformed")
    if kind == "linear":
        return RopeSpec(theta=theta, dim=dim, position_scale=1.0 / factor)
    original = _original(config, params)
    if kind == "llama3":
        low, high = params.number("low_freq_factor"), params.number("high_freq_factor")
        if high <= low:
            raise ModelFileError(f"config.json's high_freq_factor {high} is not above low_freq_factor {low}")
        factors = llama3_factors(theta, dim, factor=factor, low=low, high=high, original=original)
        return RopeSpec(theta=theta, dim=dim, inv_freq_factors=factors)
    if kind == "yarn":
        fast, slow = params.number("beta_fast", 32.0), params.number("beta_slow", 1.0)
        factors = yarn_factors(theta, dim, factor=factor, original=original, fast=fast, slow=slow)
        scale = params.number("attention_factor", _yarn_magnitude(factor))
        return RopeSpec(theta=theta, dim=dim, inv_freq_factors=factors, magnitude_scale=scale)
    raise ModelFileError(
        f"config.json asks for rotary scaling {kind!r}: default, linear, llama3, yarn and longrope are known"
    )


def _yarn_magnitude(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(config: Config, params: Config) -> int:
    fallback = config.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
    original = params.integer("original_max_position_embeddings", fallback)
    if original < 1:
        raise ModelFileError(
            f"config.json's original_max_position_embeddings is {original}: the model file is malformed"
        )
    return original


def _hf_longrope(config: Config, params: Config, theta: float, dim: int) -> RopeSpec:
    original, most = _original(config, params), config.integer("max_position_embeddings")
    stretched = (config.context_length or original) > original
    factors = params.numbers("long_factor" if stretched else "short_factor")
    factor = params.number("factor", most / original)
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeSpec(
        theta=theta, dim=dim, inv_freq_factors=factors, magnitude_scale=params.number("attention_factor", scale)
    )


def gguf_rope(meta: Metadata, head_dim: int, layout: Layout, *, theta: float = 10000.0) -> RopeSpec:
    """Return the rotation that GGUF metadata describes.

    Raises:
        ModelFileError: a scaling that is not supported, or malformed numbers.
    """
    theta = meta.number("rope.freq_base", theta)
    dim = meta.integer("rope.dimension_count", head_dim)
    kind = meta.text("rope.scaling.type", "none")
    if kind == "longrope" or "rope_factors_long.weight" in meta.shapes:
        return _gguf_longrope(meta, theta, dim, layout)
    factors = meta.factors("rope_freqs.weight")
    factor = meta.number("rope.scaling.factor", 1.0)
    if kind == "none" and factor != 1.0:
        kind = "linear"  # files written before the type existed
    if kind in ("none", "linear"):
        if factor < 1:
            raise ModelFileError(f"GGUF metadata scales the rotation by {factor}, below 1: the file is malformed")
        return RopeSpec(theta=theta, dim=dim, layout=layout, inv_freq_factors=factors, position_scale=1.0 / factor)
    if kind == "yarn":
        original = meta.integer("rope.scaling.original_context_length")
        if original < 1 or factor < 1:
            raise ModelFileError(f"GGUF metadata: yarn by {factor} from a context of {original}: the file is malformed")
        factors = yarn_factors(theta, dim, factor=factor, original=original, fast=32.0, slow=1.0)
        scale = _yarn_magnitude(factor) * meta.number("rope.scaling.attn_factor", 1.0)
        return RopeSpec(theta=theta, dim=dim, layout=layout, inv_freq_factors=factors, magnitude_scale=scale)
    raise ModelFileError(f"GGUF metadata asks for rotary scaling {kind!r}: none, linear, yarn and longrope are known")


def _gguf_longrope(meta: Metadata, theta: float, dim: int, layout: Layout) -> RopeSpec:
    most = meta.integer("context_length")
    original = meta.integer("rope.scaling.original_context_length", most)
    stretched = (meta.context_length or original) > original
    factors = meta.factors("rope_factors_long.weight" if stretched else "rope_factors_short.weight")
    if original < 2 or most < 1:
        raise ModelFileError(f"GGUF metadata: longrope from a context of {original} to {most}: the file is malformed")
    default = math.sqrt(1 + math.log(most / original) / math.log(original)) if most > original else 1.0
    scale = meta.number("rope.scaling.attn_factor", default)
    return RopeSpec(theta=theta, dim=dim, layout=layout, inv_freq_factors=factors, magnitude_scale=scale)
