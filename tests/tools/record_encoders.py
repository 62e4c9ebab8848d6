"""Record what Hugging Face transformers computes for encoders, in float32.

    python tests/tools/record_encoders.py MINILM_DIRECTORY > tests/golden/encoders.json

needs ``torch`` and ``transformers``. all-MiniLM-L6-v2: token ids and sentence embeddings (mean pooling over the tokens, length
1, as its model card does) of a few texts. Tiny random models of the other kinds: as in record_families.py.
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
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

TEXTS = [
    "This is an example sentence",
    "Each sentence is converted",
    "How many people live in Berlin?",
    "Berlin has a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "naïve café — 東京 is a city; 🙂 is an emoji.",
    "x",
    "def add(a, b):\n    return a + b",
    "word " * 150,
]
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}
KINDS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "bert": ("bert", AutoModel, {"layer_norm_eps": 1e-12}),
    "roberta": ("roberta", AutoModel, {"layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "bert-cross": ("bert", AutoModelForSequenceClassification, {"num_labels": 1}),
    "xlm-roberta-cross": (
        "xlm-roberta",
        AutoModelForSequenceClassification,
        {"num_labels": 3, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
}
LENGTHS = [1, 9, 40]


@torch.inference_mode()
def sentences(folder: str) -> list[dict[str, Any]]:
    """Embeddings of TEXTS, each alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    out = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=256).input_ids
        mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        vector = (mean / mean.norm()).tolist()
        out.append({"text": text, "ids": ids, "vector": [round(v, 6) for v in vector]})
    return out


@torch.inference_mode()
def tiny(kind: str, loader: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """A tiny model's hidden states of the first and last token, or its logits."""
    config = AutoConfig.for_model(kind, **COMMON | changes)
    with tempfile.TemporaryDirectory() as folder:
        loader.from_config(config).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        shapes = {name: list(array.shape) for name, array in sorted(load_file(file).items())}
        save_file({name: values(name, shape) for name, shape in shapes.items()}, file, {"format": "pt"})
        model = loader.from_pretrained(folder, attn_implementation="eager").eval()
        written = json.loads((Path(folder) / "config.json").read_text())
    cases = []
    for length in LENGTHS:
        ids = [2 + int(i) % 62 for i in np.random.PCG64(length).random_raw(length)]
        types = [int(2 * i >= length) for i in range(length)] if kind == "bert" else [0] * length
        got = model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        case: dict[str, Any] = {"ids": ids, "types": types}
        if loader is AutoModel:
            hidden = got.last_hidden_state[0].double()
            for name, vector in (("cls", hidden[0]), ("last", hidden[-1]), ("mean", hidden.mean(0))):
                case[name] = [round(float(v), 6) for v in vector]
        else:
            case["labels"] = [round(float(v), 6) for v in got.logits[0].double()]
        cases.append(case)
    return {"config": written, "tensors": shapes, "cases": cases}


def main() -> None:
    """Write the JSON to standard output."""
    out: dict[str, Any] = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "all-MiniLM-L6-v2": sentences(sys.argv[1]),
        "tiny": {name: tiny(*case) for name, case in KINDS.items()},
    }
    sys.stdout.write(json.dumps(out, separators=(",", ":")).replace('{"text"', '\n{"text"') + "\n")


main()
