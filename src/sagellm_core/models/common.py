"""What most families share: the llama-shaped spec, with a family's differences as keyword arguments."""

from __future__ import annotations

import math
from typing import Any

from sagellm_backend.spec import DecoderSpec, RopeSpec
from sagellm_core.models.rope import Layout, gguf_rope, hf_rope
from sagellm_core.models.views import Config, Metadata
from sagellm_protocol.errors import ModelFileError

__all__ = ["activation", "all_layers", "gguf_base", "gguf_windows", "hf_base", "hf_windows", "rope_context"]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


def all_layers(count: int) -> tuple[int, ...]:
    """Return 0 … count - 1, of no more layers than `check_spec` lets pass."""
    return tuple(range(max(0, min(count, 4097))))


def activation(config: Config, key: str = "hidden_act", default: str | None = None) -> str:
    """Return the gate's activation in the spec's words.

    Raises:
        ModelFileError: one that no family here has.
    """
    name = config.text(key, default)
    if name not in _ACTIVATIONS:
        raise ModelFileError(f"config.json's {key} {name!r} is unknown: {', '.join(_ACTIVATIONS)} are known")
    return _ACTIVATIONS[name]


def gguf_base(meta: Metadata, *, layout: Layout, **changes: Any) -> DecoderSpec:
    """Return a llama-shaped spec of GGUF metadata, with `changes` on top.

    Raises:
        ModelFileError: a key is missing or malformed.
    """
    d_model, n_heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    if n_heads < 1:
        raise ModelFileError(f"GGUF metadata: {n_heads} attention heads: the file is malformed")
    head_dim = meta.integer("attention.key_length", d_model // n_heads)
    if meta.integer("attention.value_length", head_dim) != head_dim:
        raise ModelFileError("GGUF metadata: keys and values of different widths are not supported")
    values: dict[str, Any] = {
        "architecture": meta.architecture,
        "n_layers": meta.integer("block_count"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": meta.integer("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "d_ff": meta.integer("feed_forward_length", 1) or 1,
        "vocab_size": meta.vocab_size(),
        "context_length": meta.integer("context_length"),
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "attention_scale": meta.number("attention.scale", 0.0) or 1.0 / math.sqrt(max(head_dim, 1)),
        "tied_head": "output.weight" not in meta.shapes,
    }
    if "rope" not in changes:
        values["rope"] = gguf_rope(meta, head_dim, layout)
    values["context_length"] = rope_context(values["context_length"], meta, values.get("rope"))
    return DecoderSpec(**values | changes)


def hf_base(config: Config, **changes: Any) -> DecoderSpec:
    """Return a llama-shaped spec of a config.json, with `changes` on top.

    Raises:
        ModelFileError: a key is missing or malformed.
    """
    d_model, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if n_heads < 1:
        raise ModelFileError(f"config.json has {n_heads} attention heads: the model file is malformed")
    head_dim = config.integer("head_dim", d_model // n_heads)
    values: dict[str, Any] = {
        "architecture": config.text("model_type"),
        "n_layers": config.integer("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": config.integer("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "d_ff": config.integer("intermediate_size", 1),
        "vocab_size": config.integer("vocab_size"),
        "context_length": config.integer("max_position_embeddings"),
        "norm_eps": config.number("rms_norm_eps"),
        "attention_scale": 1.0 / math.sqrt(max(head_dim, 1)),
        "tied_head": config.tied(),
    }
    if "activation" not in changes:
        values["activation"] = activation(config, default="silu")
    if "rope" not in changes:
        values["rope"] = hf_rope(config, head_dim)
    values["context_length"] = rope_context(values["context_length"], config, values.get("rope"))
    return DecoderSpec(**values | changes)


def rope_context(length: int, view: Config | Metadata, rope: RopeSpec | None) -> int:
    """Return the positions that hold with the chosen rotation: longrope has one set of factors for the original context.

    The long set is chosen when the caller asks for more than the original context; else the model is as long as the
    short set, because a set that changes in mid-sequence would make the KV cache wrong.
    """
    if rope is None or rope.inv_freq_factors is None or view.context_length is not None:
        return length
    if isinstance(view, Metadata):
        if "rope_factors_short.weight" in view.shapes:
            return view.integer("rope.scaling.original_context_length", length)
        return length
    params = view.table("rope_parameters") or view.table("rope_scaling")
    if params is not None and params.has("short_factor"):
        return params.integer(
            "original_max_position_embeddings", view.integer("original_max_position_embeddings", length)
        )
    return length


def gguf_windows(meta: Metadata, window: int, pattern: int, n_layers: int) -> tuple[int, ...]:
    """Return each layer's window: `window`, but every `pattern`-th layer sees all, or as the file says of each layer.

    Raises:
        ModelFileError: as many flags as layers are expected.
    """
    flags = meta.flags("attention.sliding_window_pattern")
    if flags is None:
        pattern = meta.integer("attention.sliding_window_pattern", pattern)
        flags = tuple(pattern < 1 or (layer + 1) % pattern != 0 for layer in all_layers(n_layers))
    elif len(flags) != n_layers:
        raise ModelFileError(f"GGUF metadata has {len(flags)} window flags for {n_layers} layers: it is malformed")
    return tuple(window if flag else 0 for flag in flags)


def hf_windows(config: Config, n_layers: int, *, default_on: bool = True) -> tuple[int, ...]:
    """Return each layer's window from `sliding_window` and, where given, `layer_types`.

    Raises:
        ModelFileError: as many layer types as layers are expected.
    """
    window = config.integer("sliding_window", 0)
    if not window or not config.flag("use_sliding_window", default_on):
        return ()
    kinds = config.items("layer_types")
    if kinds is None:
        first = config.integer("max_window_layers", 0)
        return tuple(0 if layer < first else window for layer in range(n_layers))
    if len(kinds) != n_layers:
        raise ModelFileError(f"config.json names {len(kinds)} layer types for {n_layers} layers: it is malformed")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()
