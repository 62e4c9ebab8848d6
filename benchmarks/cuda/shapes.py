"""Real shapes with random weights, made on the device: what is measured does not depend on the values."""

from __future__ import annotations

import math
from math import prod

import torch

from sagellm_backend.base import LoadOptions
from sagellm_backend.cuda.matrix import Matrix
from sagellm_backend.cuda.runner import CudaRunner
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.cuda.weights import Projection, WeightSet
from sagellm_backend.spec import DecoderSpec, RopeSpec

LLAMA_8B = DecoderSpec(
    architecture="llama",
    n_layers=32,
    d_model=4096,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    vocab_size=128256,
    context_length=131072,
    norm_eps=1e-5,
    rope=RopeSpec(theta=5e5, dim=128),
    attention_scale=1 / math.sqrt(128),
)
QWEN3_06B = DecoderSpec(
    architecture="qwen3",
    n_layers=28,
    d_model=1024,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    d_ff=3072,
    vocab_size=151936,
    context_length=40960,
    norm_eps=1e-6,
    rope=RopeSpec(theta=1e6, dim=128),
    attention_scale=1 / math.sqrt(128),
    qk_norm="head",
    tied_head=True,
)
SHAPES = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B}


def random_weight_set(spec: DecoderSpec, device: str) -> WeightSet:
    """bf16 weights of a size that keeps activations in range."""

    def matrix(outputs: int, inputs: int) -> Matrix:
        return Matrix(
            "dense", torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device).mul_(0.7 / math.sqrt(inputs))
        )

    vectors, projections = {}, {}
    heads, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    parts = {
        "qkv": ({"q": heads, "k": kv, "v": kv}, spec.d_model),
        "o": ({"o": spec.d_model}, heads),
        "gate_up": ({"gate": spec.d_ff, "up": spec.d_ff}, spec.d_model),
        "down": ({"down": spec.d_model}, spec.d_ff),
    }
    for layer in range(spec.n_layers):
        for name, (outputs, inputs) in parts.items():
            slots = tuple((f"{layer}.{slot}", n) for slot, n in outputs.items())
            projections[f"{layer}.{name}"] = Projection((matrix(sum(outputs.values()), inputs),), slots)
    for slot, shape in spec.slots().items():
        if len(shape) == 1:
            vectors[slot] = torch.ones(shape, device=device)
    embed = matrix(spec.vocab_size, spec.d_model)
    head = embed if spec.tied_head else matrix(spec.vocab_size, spec.d_model)
    return WeightSet(torch.bfloat16, vectors, projections, embed, head)


def random_runner(spec: DecoderSpec, options: LoadOptions, settings: CudaSettings) -> CudaRunner:
    """A runner with random weights."""
    return CudaRunner(spec, random_weight_set(spec, settings.device), options, settings, "bf16")


def read_bytes(spec: DecoderSpec, batch: int, context: int) -> int:
    """Bytes that a decode step must read: every weight once (of an untied embedding only rows), and the keys and values."""
    weights = sum(prod(shape) for slot, shape in spec.slots().items() if slot != "embed" or spec.tied_head) * 2
    return weights + batch * context * spec.n_layers * 2 * spec.n_kv_heads * spec.head_dim * 2


def prefill_flops(spec: DecoderSpec, rows: int) -> float:
    """Multiplications and additions of a prompt's products: matrices for every row, the head for the last, causal attention."""
    per_row = sum(
        prod(shape) for slot, shape in spec.slots().items() if len(shape) == 2 and slot not in ("embed", "head")
    )
    attention = spec.n_layers * 2 * spec.n_heads * spec.head_dim * rows * rows / 2
    return 2 * (per_row * rows + attention + spec.vocab_size * spec.d_model)
