"""Sizes that fill no register: the native backend pads them, and still computes what the reference computes."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from sagellm_backend.base import LoadOptions
from sagellm_backend.conformance import Kit, batch_does_not_matter, chunking_does_not_matter, forward_matches_reference
from sagellm_backend.conformance_specs import SPECS
from sagellm_backend.cpu import CpuBackend
from sagellm_backend.spec import DecoderSpec, ExpertSpec, RopeSpec

pytest.importorskip("sagellm_backend.cpu._native", reason="built without the extension")


def odd(head_dim: int, heads: int, kv_heads: int, d_model: int, d_ff: int, **changes: object) -> DecoderSpec:
    rope = RopeSpec(theta=1e4, dim=head_dim // 4 * 2)
    sizes = {"head_dim": head_dim, "n_heads": heads, "n_kv_heads": kv_heads, "d_model": d_model, "d_ff": d_ff}
    scale = head_dim**-0.5
    return msgspec.structs.replace(SPECS["qwen3"], vocab_size=333, rope=rope, attention_scale=scale, **sizes, **changes)


ODD = {
    "40 of 72": odd(40, 3, 1, 72, 100),
    "18 of 50": odd(18, 5, 5, 50, 33, qk_norm="none", qkv_bias=True),
    "96, nine heads a KV head": odd(96, 9, 1, 96, 64),
    "256": odd(256, 2, 1, 64, 96, qk_norm="full", norm_placement="post"),
    "experts of 40": odd(
        40, 4, 2, 72, 64, experts=ExpertSpec(n_experts=5, top_k=2, d_ff=40), expert_layers=(0, 1), norm_placement="both"
    ),
}
OPTIONS = LoadOptions(n_blocks=64, max_rows=128, max_logit_rows=32, threads=3, kv_dtype="f32")


@pytest.mark.parametrize("check", [forward_matches_reference, chunking_does_not_matter, batch_does_not_matter])
def test_odd_sizes(check: Callable[[Kit], None]) -> None:
    """Odd head sizes, widths and vocabularies give the reference's logits, in any batch, bit for bit."""
    check(Kit(CpuBackend(), tolerance=2e-3, options=OPTIONS, specs=ODD | {"llama": SPECS["llama"]}))
