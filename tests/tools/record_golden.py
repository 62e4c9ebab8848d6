"""Record what Hugging Face transformers computes on a GGUF file's dequantised weights, in float32.

    python tests/tools/record_golden.py MODEL.gguf OUT.json [--prompts N]

needs ``torch``, ``transformers`` and ``gguf``; nothing of ours takes part. For each prompt the 32 greedy tokens are recorded with,
at every step, the log-probability of the chosen token and of the five likeliest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 5, 8, 13,",
    "SELECT name, age FROM users WHERE",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, the first human being",
    "La tour Eiffel se trouve",
    '{"name": "Ada", "born": 1815, "field":',
    "To bake a cake you need flour,",
    "Photosynthesis is the process by which",
    "Q: What is 17 plus 25?\nA:",
    "A list of fruits:\n- apple\n- banana\n-",
    "The quick brown fox jumps over the lazy dog. " * 6 + "The quick",
    "Die Hauptstadt von Deutschland",
    "She opened the door and saw",
]
STEPS = 32
TOP = 5


def main() -> None:
    """Write OUT."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    options = parser.parse_args()
    folder, name = str(options.model.parent), options.model.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    cases = [record(model, tokenizer(text).input_ids, text) for text in PROMPTS[: options.prompts]]
    document = {
        "model": name,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": cases,
    }
    options.out.write_text(json.dumps(document, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"') + "\n")


@torch.inference_mode()
def record(model: torch.nn.Module, ids: list[int], text: str) -> dict[str, object]:
    """Continue one prompt greedily; the log-probabilities are of one pass over the whole text."""
    sequence = list(ids)
    for _ in range(STEPS):
        logits = model(torch.tensor([sequence])).logits[0, -1]
        sequence.append(int(logits.argmax()))
    logprobs = model(torch.tensor([sequence])).logits[0].double().log_softmax(-1)[len(ids) - 1 : -1]
    top = logprobs.topk(TOP)
    return {
        "prompt": text,
        "prompt_ids": ids,
        "output_ids": sequence[len(ids) :],
        "logprobs": [round(float(row[token]), 6) for row, token in zip(logprobs, sequence[len(ids) :], strict=True)],
        "top_ids": top.indices.tolist(),
        "top_logprobs": [[round(float(v), 6) for v in row] for row in top.values],
    }


main()
