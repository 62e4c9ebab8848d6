"""Real shapes with random weights, made on the device: what is measured does not depend on the values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

import msgspec
import torch

from sagellm_backend.base import LoadOptions
from sagellm_backend.cuda.device import on_device
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


@dataclass(frozen=True)
class Sizes:
    """How large everything is that is measured.

    Attributes:
        large, small: the two models.
        copied, gemm: bytes and edge of what the limits are measured with.
        batch, context: of the large decode step.
        prompt: rows of the long prompt.
        steps: decode steps of a measurement.
        requests, words: how many requests the mix has, and shortest and longest prompt and answer in tokens.
        edge: inputs of the operations that are checked.
    """

    large: DecoderSpec = LLAMA_8B
    small: DecoderSpec = QWEN3_06B
    copied: int = 1 << 30
    gemm: int = 8192
    batch: int = 256
    context: int = 1024
    prompt: int = 8192
    steps: int = 64
    requests: int = 256
    words: tuple[int, int] = (100, 1024)
    edge: int = 4096


def _tiny(spec: DecoderSpec) -> DecoderSpec:
    rope = msgspec.structs.replace(spec.rope, dim=32)
    return msgspec.structs.replace(
        spec, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=96, vocab_size=500, rope=rope,
        context_length=1024,
    )  # fmt: skip


REAL = Sizes()
TINY = Sizes(
    large=_tiny(LLAMA_8B), small=_tiny(QWEN3_06B), copied=1 << 16, gemm=64, batch=4, context=40, prompt=300, steps=8,
    requests=6, words=(4, 16), edge=64,
)  # fmt: skip
"""For a rehearsal without a GPU: every line of the run, at a size that says nothing about speed."""


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
    with on_device(settings):
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
