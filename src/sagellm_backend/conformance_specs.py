"""One tiny random model of every kind of decoder, for the conformance kit and for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from sagellm_backend.adapter import ADAPTED, Adapter
from sagellm_backend.base import RowSampling
from sagellm_backend.encoder import EncoderSpec
from sagellm_backend.spec import DecoderSpec, ExpertSpec, RopeSpec
from sagellm_backend.tensors import Tensor, Weights
from sagellm_protocol.sampling import SamplingParams

__all__ = ["SPECS", "random_adapter", "random_ids", "random_weights", "sampling_rows"]

_HEAD = 32
_BASE = DecoderSpec(
    architecture="llama",
    n_layers=2,
    d_model=128,
    n_heads=4,
    n_kv_heads=2,
    head_dim=_HEAD,
    d_ff=192,
    vocab_size=320,
    context_length=1024,
    norm_eps=1e-5,
    rope=RopeSpec(theta=10000.0, dim=_HEAD, layout="interleaved"),
    attention_scale=1 / math.sqrt(_HEAD),
)
_HALF = RopeSpec(theta=10000.0, dim=_HEAD)
_FACTORS = tuple(1.0 if i < 6 else 1.0 + 0.7 * (i - 5) for i in range(_HEAD // 2))


def _like(architecture: str, **changes: object) -> DecoderSpec:
    return msgspec.structs.replace(_BASE, architecture=architecture, **changes)


SPECS: dict[str, DecoderSpec] = {
    "llama": _BASE,
    "mha": _like("llama", n_kv_heads=4, rope=_HALF, tied_head=True),
    "mqa": _like("llama", n_kv_heads=1, rope=_HALF),
    "llama3": _like("llama", rope=RopeSpec(theta=5e5, dim=_HEAD, inv_freq_factors=_FACTORS)),
    "linear": _like("llama", rope=RopeSpec(theta=1e4, dim=_HEAD, position_scale=0.25)),
    "longrope": _like("phi3", rope=RopeSpec(theta=1e4, dim=_HEAD, inv_freq_factors=_FACTORS, magnitude_scale=1.19)),
    "partial": _like("phi", rope=RopeSpec(theta=1e4, dim=_HEAD // 2), o_bias=True, qkv_bias=True),
    "mistral": _like("mistral", rope=_HALF, windows=(24, 24)),
    "qwen2": _like("qwen2", rope=_HALF, qkv_bias=True, tied_head=True),
    "qwen3": _like("qwen3", rope=_HALF, qk_norm="head"),
    "olmo2": _like("olmo2", rope=_HALF, norm_placement="post", qk_norm="full"),
    "gemma2": _like(
        "gemma2",
        rope=_HALF,
        norm_placement="both",
        activation="gelu_tanh",
        windows=(20, 0),
        attention_softcap=5.0,
        final_softcap=8.0,
        embed_scale=math.sqrt(128),
        attention_scale=1 / 8,
        tied_head=True,
    ),
    "gemma3": _like(
        "gemma3",
        rope=RopeSpec(theta=1e6, dim=_HEAD, position_scale=0.125),
        rope_local=_HALF,
        norm_placement="both",
        qk_norm="head",
        activation="gelu_tanh",
        windows=(16, 0),
        embed_scale=math.sqrt(128),
        tied_head=True,
    ),
    "granite": _like("granite", rope=_HALF, embed_scale=6.0, residual_scale=0.4, logit_scale=0.5, attention_scale=0.1),
    "gelu": _like("llama", rope=_HALF, activation="gelu"),
    "mixtral": _like("mixtral", rope=_HALF, experts=ExpertSpec(n_experts=4, top_k=2, d_ff=96), expert_layers=(0, 1)),
    "qwen3moe": _like(
        "qwen3moe",
        rope=_HALF,
        qk_norm="head",
        experts=ExpertSpec(n_experts=8, top_k=3, d_ff=64, normalize=False),
        expert_layers=(1,),
    ),
}
"""Kind -> spec. Sizes suit kernels that want multiples of 32."""


@dataclass(frozen=True)
class _Draw:
    mean: float
    deviation: float


def random_weights(spec: DecoderSpec | EncoderSpec, seed: int = 7) -> Weights:
    """Return float32 weights whose activations keep their size through the layers."""
    rng = np.random.default_rng(seed)
    out: dict[str, Tensor] = {}
    for slot, shape in spec.slots().items():
        kind = _draw(slot, shape)
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(kind.deviation) + np.float32(kind.mean)
        out[slot] = Tensor.of(values)
    return out


def _draw(slot: str, shape: tuple[int, ...]) -> _Draw:
    if slot.endswith("norm"):
        return _Draw(1.0, 0.2)
    if slot.endswith("bias"):
        return _Draw(0.0, 0.2)
    if slot == "embed":
        return _Draw(0.0, 0.2)
    return _Draw(0.0, 1.2 / math.sqrt(shape[-1]))


def random_adapter(spec: DecoderSpec, seed: int = 0, rank: int = 4) -> Adapter:
    """Return an adapter of all dense weights whose effect is plain to see."""
    rng = np.random.default_rng(seed)
    factors = {}
    for slot, shape in spec.slots().items():
        if slot.partition(".")[2] in ADAPTED:
            a = rng.standard_normal((rank, shape[1]), dtype=np.float32) / np.float32(math.sqrt(shape[1]))
            factors[slot] = (a, rng.standard_normal((shape[0], rank), dtype=np.float32) * np.float32(0.2))
    return Adapter(f"random-{seed}", factors)


def random_ids(spec: DecoderSpec, count: int, seed: int = 0) -> list[int]:
    """Return `count` token ids."""
    return [int(t) for t in np.random.default_rng(seed).integers(0, spec.vocab_size, count)]


def sampling_rows(vocab: int) -> list[RowSampling]:
    """One row for each way to draw, with others for their combinations."""
    rng = np.random.default_rng(11)
    mask = rng.integers(0, 2**32, (vocab + 31) // 32, dtype=np.uint32)
    history = np.asarray(rng.integers(0, vocab, 60), np.int32)
    past = {"history": history, "n_prompt": 20}
    rows: list[tuple[dict[str, object], dict[str, object]]] = [
        ({"temperature": 0.0}, {"logprobs": 5}),
        ({"temperature": 0.0}, {"mask": mask, "logprobs": 0}),
        ({}, {"logprobs": 3}),
        ({"temperature": 1.8}, {}),
        ({"temperature": 0.2}, {"logprobs": 20}),
        ({"top_k": 1}, {}),
        ({"top_k": 40}, {"logprobs": 1}),
        ({"top_p": 0.3}, {}),
        ({"top_p": 0.95}, {}),
        ({"min_p": 0.05}, {}),
        ({"typical_p": 0.5}, {}),
        ({"typical_p": 0.95, "temperature": 1.3}, {}),
        ({"temperature": 0.8, "top_k": 50, "typical_p": 0.97, "top_p": 0.9, "min_p": 0.01}, {}),
        ({"repetition_penalty": 1.3}, past),
        ({"presence_penalty": 1.5, "frequency_penalty": 0.7}, past),
        ({"repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": -0.3, "temperature": 0.0}, past),
        ({"logit_bias": {3: 8.0, 5: -100.0, 7: 7.5}}, {"banned": (3,)}),
        ({"allowed_token_ids": (1, 4, 9, 70)}, {"mask": mask, "banned": (4,)}),
        ({}, {"mask": np.zeros_like(mask)}),
        ({"temperature": 0.0}, {"mask": np.zeros_like(mask)}),
        ({}, {"target": 17, "logprobs": 2}),
        ({}, {"target": 0}),
    ]
    return [RowSampling(params=SamplingParams(**params), **row) for params, row in rows]  # type: ignore[arg-type]
