"""transformers' continuous batching on the requests of the mix, where it is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from bench import Bench, Row
from speed import mix_requests

__all__ = ["peer"]

ANSWER = 256


def peer(bench: Bench) -> Iterator[Row]:
    """All prompts of the mix at once, `ANSWER` tokens each; the rate counts from the first request's start, without its warm-up."""
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config
    except ImportError as error:
        yield {"work": "transformers' continuous batching", "value": f"transformers is not there ({error})"}
        return
    spec = bench.sizes.small
    config = Qwen3Config(
        hidden_size=spec.d_model,
        intermediate_size=spec.d_ff,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        tie_word_embeddings=True,
    )
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    requests = mix_requests(bench, bench.sizes.requests, 0, spec.vocab_size)
    generation = GenerationConfig(
        max_new_tokens=min(ANSWER, bench.sizes.words[1]),
        do_sample=True,
        temperature=0.6,
        eos_token_id=-1,
        pad_token_id=0,
    )
    began = time.perf_counter()
    outputs = model.generate_batch(
        inputs=[list(request.prompt_token_ids) for request in requests], generation_config=generation
    )
    whole = time.perf_counter() - began
    done = [out for out in outputs.values() if out.error is None]
    tokens = sum(len(out.generated_tokens) for out in done)
    spans = [out.lifespan for out in done if out.lifespan[0] >= 0]
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans) if spans else whole
    yield {
        "work": f"transformers' continuous batching, {len(done)} of {len(requests)} requests",
        "value": f"{tokens / seconds:,.0f} tokens/s in {seconds:.1f} s ({whole:.1f} s with its start)",
        "tokens_per_s": tokens / seconds,
    }
