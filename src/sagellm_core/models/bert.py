"""bert, roberta and xlm-roberta: embedding models and cross-encoders."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sagellm_backend.encoder import EncoderSpec
from sagellm_core.models.base import Slots, Source
from sagellm_core.models.views import Config
from sagellm_protocol.errors import ModelFileError

__all__ = ["MODEL_TYPES", "Sentence", "encoder_slots", "encoder_spec"]

MODEL_TYPES = ("bert", "roberta", "xlm-roberta")

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True, slots=True)
class Sentence:
    """What sentence-transformers' files beside the weights say.

    Attributes:
        pooling: how embeddings are made.
        normalize: whether they are scaled to length 1.
        max_tokens: most tokens of an input, None for the model's own limit.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_tokens: int | None = None


def encoder_spec(config: Config, sentence: Sentence) -> EncoderSpec:
    """Return the spec of a config.json.

    Raises:
        ModelFileError: a key is missing, malformed, or says something that no encoder here does.
    """
    kind = config.text("model_type")
    if kind not in MODEL_TYPES:
        raise ModelFileError(f"encoder {kind!r} is not supported: {', '.join(MODEL_TYPES)} are")
    positions = config.text("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ModelFileError(f"position_embedding_type {positions!r} is not supported: absolute is")
    act = config.text("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise ModelFileError(f"config.json's hidden_act {act!r} is unknown: {', '.join(_ACTIVATIONS)} are known")
    # roberta counts positions from its padding id + 1 on.
    offset = 0 if kind == "bert" else config.integer("pad_token_id", 1) + 1
    n_positions = config.integer("max_position_embeddings")
    d_model, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    longest = n_positions - offset
    _check(kind, d_model, n_heads, longest)
    return EncoderSpec(
        architecture=kind,
        n_layers=config.integer("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        d_ff=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        context_length=min(longest, sentence.max_tokens or longest),
        n_positions=n_positions,
        position_offset=offset,
        token_types=config.integer("type_vocab_size", 0),
        norm_eps=config.number("layer_norm_eps"),
        activation=_ACTIVATIONS[act],  # type: ignore[arg-type]
        pooling=sentence.pooling,  # type: ignore[arg-type]
        normalize=sentence.normalize,
        n_labels=_labels(config),
    )


def _check(kind: str, d_model: int, n_heads: int, longest: int) -> None:
    if n_heads < 1 or d_model < 1 or d_model % n_heads:
        raise ModelFileError(f"{kind}: a width of {d_model} cannot be shared by {n_heads} heads: the file is malformed")
    if longest < 1:
        raise ModelFileError(f"{kind}: {longest} positions are left for tokens: the file is malformed")


def _labels(config: Config) -> int:
    names = config.items("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in names):
        return 0
    labels = config.table("id2label")
    return len(labels.values) if labels is not None else config.integer("num_labels", 2)


_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_OUTER = {
    "embed": "embeddings.word_embeddings.weight",
    "position_embed": "embeddings.position_embeddings.weight",
    "type_embed": "embeddings.token_type_embeddings.weight",
    "embed_norm": "embeddings.LayerNorm.weight",
    "embed_norm_bias": "embeddings.LayerNorm.bias",
}


def encoder_slots(spec: EncoderSpec, names: Collection[str]) -> Slots:
    """Return the slots under the names of transformers; files of sentence-transformers leave the model's prefix out."""
    prefix = next((p for p in ("", "bert.", "roberta.") if f"{p}{_OUTER['embed']}" in names), "")
    out: Slots = {}
    for slot in spec.slots():
        layer, dot, leaf = slot.partition(".")
        if dot:
            name = leaf.removesuffix("_bias")
            end = "bias" if leaf.endswith("_bias") else "weight"
            out[slot] = Source((f"{prefix}encoder.layer.{layer}.{_LAYER[name]}.{end}",))
        elif slot in _OUTER:
            out[slot] = Source((prefix + _OUTER[slot],))
        else:
            out[slot] = Source((_classifier(spec, slot, prefix),))
    return out


def _classifier(spec: EncoderSpec, slot: str, prefix: str) -> str:
    end = "bias" if slot.endswith("_bias") else "weight"
    if spec.architecture == "bert":
        place = f"{prefix}pooler.dense" if slot.startswith("pool") else "classifier"
    else:
        place = "classifier.dense" if slot.startswith("pool") else "classifier.out_proj"
    return f"{place}.{end}"
