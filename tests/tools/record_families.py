"""Record logits of a tiny model of every decoder family, as Hugging Face transformers computes them in float32.

    python tests/tools/record_families.py > tests/golden/families.json

needs ``torch`` and ``transformers``. The weights are a pure function of the tensors' names and shapes (`tiny_models.values`), so only
the configurations, the names, the shapes and the logits are recorded; the test makes the same weights again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_models import values
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LOCAL = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {"head_dim": 8, "use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 12,
            "layer_types": LOCAL,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 12,
            "layer_types": LOCAL,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "olmo2": ("olmo2", {"head_dim": 8}),
    "granite": (
        "granite",
        {
            "head_dim": 8,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "phi3": ("phi3", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
    ),
}
ROWS = [0, 5, 17, 39]


@torch.inference_mode()
def record(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One family's case."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON | changes)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        shapes = {name: list(array.shape) for name, array in sorted(load_file(file).items())}
        save_file({name: values(name, shape) for name, shape in shapes.items()}, file, {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        written = json.loads((Path(folder) / "config.json").read_text())
    ids = np.random.PCG64(3).random_raw(40) % np.uint64(COMMON["vocab_size"])
    logits = model(torch.tensor([[int(i) for i in ids]])).logits[0][ROWS].double()
    return {
        "config": written,
        "tensors": shapes,
        "ids": [int(i) for i in ids],
        "rows": ROWS,
        "logits": [[round(float(v), 6) for v in row] for row in logits],
    }


def main() -> None:
    """Write the JSON to standard output."""
    out: dict[str, Any] = {"made_with": {"torch": torch.__version__, "transformers": transformers.__version__}}
    out["families"] = {name: record(kind, changes) for name, (kind, changes) in FAMILIES.items()}
    text = json.dumps(out, separators=(",", ":"))
    sys.stdout.write(text.replace('{"config"', '\n{"config"') + "\n")


if __name__ == "__main__":
    main()
