"""Record logits of tiny models with LoRA adapters, as Hugging Face PEFT computes them in float32.

    python tests/tools/record_lora.py > tests/golden/lora.json

needs ``torch``, ``transformers`` and ``peft``. Base models are those of record_families.py; the adapters' factors follow the same
rule (`values`), so only their configuration, names, shapes and the logits are recorded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from record_families import COMMON, FAMILIES
from safetensors.numpy import load_file, save_file
from tiny_models import values
from transformers import AutoConfig, AutoModelForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": LINEAR}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "qwen2",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"v_proj": 9},
        },
    ),
    "fused": ("phi3", {"r": 3, "lora_alpha": 6, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gemma3": ("gemma3", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}),
}


@torch.inference_mode()
def record(family: str, options: dict[str, Any]) -> dict[str, Any]:
    """One case."""
    kind, changes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **COMMON | changes)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        refill(base / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        lora = Path(folder) / "lora"
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(lora)
        shapes = refill(lora / "adapter_model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        adapted = peft.PeftModel.from_pretrained(model, lora).eval()
        written = json.loads((lora / "adapter_config.json").read_text())
    ids = [int(i) for i in np.random.PCG64(3).random_raw(20) % np.uint64(COMMON["vocab_size"])]
    logits = adapted(torch.tensor([ids])).logits[0, -1].double()
    written["base_model_name_or_path"] = ""
    return {
        "family": family,
        "config": written,
        "tensors": shapes,
        "ids": ids,
        "logits": [round(float(v), 6) for v in logits],
    }


def refill(file: Path) -> dict[str, list[int]]:
    """Replace a file's tensors by those of the rule; return their shapes."""
    shapes = {name: list(array.shape) for name, array in sorted(load_file(file).items())}
    save_file({name: values(name, shape) for name, shape in shapes.items()}, file, {"format": "pt"})
    return shapes


def main() -> None:
    """Write the JSON to standard output."""
    out = {
        "made_with": {"torch": torch.__version__, "peft": peft.__version__},
        "cases": {name: record(*case) for name, case in CASES.items()},
    }
    sys.stdout.write(json.dumps(out, separators=(",", ":")).replace('{"family"', '\n{"family"') + "\n")


main()
