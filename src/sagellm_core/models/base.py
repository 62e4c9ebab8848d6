"""What a family is, and where the bytes of a weight slot come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from sagellm_backend.spec import DecoderSpec
from sagellm_core.models.views import Config, Metadata
from sagellm_protocol.errors import ModelFileError

__all__ = ["Family", "Slots", "Source", "check_spec", "gguf_slots", "hf_slots"]


@dataclass(frozen=True, slots=True)
class Source:
    """How a slot is made of the tensors of a file.

    Attributes:
        names: one tensor; or one for each expert, stacked along a new first axis.
        rows: only these rows of it (a fused projection), [start, stop).
        plus_one: the file holds the norm's weight minus 1 (gemma's safetensors).
    """

    names: tuple[str, ...]
    rows: tuple[int, int] | None = None
    plus_one: bool = False


Slots = dict[str, Source]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture family.

    Attributes:
        name: for people.
        gguf: values of `general.architecture`.
        hf: values of `model_type` in config.json.
        gguf_spec, hf_spec: metadata -> spec.
        gguf_slots, hf_slots: spec -> source of every slot; `hf_slots` also gets the file's tensor names.
    """

    name: str
    gguf: tuple[str, ...]
    hf: tuple[str, ...]
    gguf_spec: Callable[[Metadata], DecoderSpec]
    hf_spec: Callable[[Config], DecoderSpec]
    gguf_slots: Callable[[DecoderSpec], Slots]
    hf_slots: Callable[[DecoderSpec, Collection[str]], Slots]


_GGUF_MODEL = {"embed": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"}
_GGUF_LAYER = {
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "router": "ffn_gate_inp.weight",
    "experts.gate": "ffn_gate_exps.weight",
    "experts.up": "ffn_up_exps.weight",
    "experts.down": "ffn_down_exps.weight",
}
_HF_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "experts.gate": "mlp.experts.{expert}.gate_proj.weight",
    "experts.up": "mlp.experts.{expert}.up_proj.weight",
    "experts.down": "mlp.experts.{expert}.down_proj.weight",
}
_HF_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")


def gguf_slots(spec: DecoderSpec) -> Slots:
    """Return the slots under llama.cpp's tensor names."""
    out: Slots = {}
    for slot in spec.slots():
        layer, dot, leaf = slot.partition(".")
        out[slot] = Source((f"blk.{layer}.{_GGUF_LAYER[leaf]}" if dot else _GGUF_MODEL[slot],))
    return out


def hf_slots(
    spec: DecoderSpec, names: Collection[str], *, rename: Mapping[str, str] | None = None, plus_one: bool = False
) -> Slots:
    """Return the slots under the names of transformers; `rename` overrides a layer's names, `plus_one` goes to norms."""
    prefix = next((p for p in _HF_PREFIXES if f"{p}embed_tokens.weight" in names), "model.")
    leaves = _HF_LAYER | dict(rename or {})
    outer = {"embed": f"{prefix}embed_tokens.weight", "final_norm": f"{prefix}norm.weight", "head": "lm_head.weight"}
    if prefix == "language_model.model.":
        outer["head"] = "language_model.lm_head.weight"
    n_experts = spec.experts.n_experts if spec.experts else 0
    out: Slots = {}
    for slot in spec.slots():
        layer, dot, leaf = slot.partition(".")
        is_norm = plus_one and leaf.endswith("norm") if dot else plus_one and slot == "final_norm"
        if not dot:
            out[slot] = Source((outer[slot],), plus_one=is_norm)
            continue
        name = f"{prefix}layers.{layer}.{leaves[leaf]}"
        parts = tuple(name.replace("{expert}", str(e)) for e in range(n_experts)) if "{expert}" in name else (name,)
        out[slot] = Source(parts, plus_one=is_norm)
    return out


def check_spec(spec: DecoderSpec) -> None:
    """Refuse sizes that no model has, before anything is built of them.

    Raises:
        ModelFileError: a size is absurd or two of them contradict each other.
    """
    sizes = {
        "layers": (spec.n_layers, 4096),
        "d_model": (spec.d_model, 1 << 20),
        "heads": (spec.n_heads, 1 << 16),
        "KV heads": (spec.n_kv_heads, spec.n_heads),
        "head_dim": (spec.head_dim, 1 << 16),
        "d_ff": (spec.d_ff, 1 << 24),
        "vocabulary": (spec.vocab_size, 1 << 24),
        "context": (spec.context_length, 1 << 31),
    }
    if spec.experts is not None:
        sizes["experts"] = (spec.experts.n_experts, 4096)
        sizes["experts a token"] = (spec.experts.top_k, spec.experts.n_experts)
        sizes["expert d_ff"] = (spec.experts.d_ff, 1 << 24)
    for name, (value, most) in sizes.items():
        if not 1 <= value <= most:
            raise ModelFileError(
                f"{spec.architecture}: {name} is {value}, not between 1 and {most}: the file is malformed"
            )
    if spec.n_heads % spec.n_kv_heads:
        raise ModelFileError(f"{spec.architecture}: {spec.n_heads} heads cannot share {spec.n_kv_heads} KV heads")
    for rope in (spec.rope, spec.rope_local):
        if rope is not None and (rope.dim % 2 or not 2 <= rope.dim <= spec.head_dim or rope.theta <= 0):
            raise ModelFileError(
                f"{spec.architecture}: rotary dimension {rope.dim} of a head of {spec.head_dim}, theta {rope.theta}: "
                "the file is malformed"
            )
        if rope is not None and rope.inv_freq_factors is not None and len(rope.inv_freq_factors) != rope.dim // 2:
            raise ModelFileError(
                f"{spec.architecture}: {len(rope.inv_freq_factors)} rotary factors for {rope.dim // 2} frequencies"
            )
    if spec.windows and len(spec.windows) != spec.n_layers:
        raise ModelFileError(f"{spec.architecture}: {len(spec.windows)} attention windows for {spec.n_layers} layers")
