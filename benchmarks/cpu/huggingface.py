"""Write a llama GGUF file as a folder that transformers and vLLM read: the same weights in bf16, the same tokenizer.

python benchmarks/cpu/huggingface.py MODEL.gguf FOLDER
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np

from sagellm_backend.quant import dequantize, quantize
from sagellm_backend.spec import DecoderSpec
from sagellm_backend.tensors import Format
from sagellm_core.loader import open_model
from sagellm_core.loader.gguf import GGUFHeader, read_header
from sagellm_core.models.llama import FAMILY
from sagellm_core.text.from_gguf import convert_gguf


def write_folder(source: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files; config.json comes last, so a folder with it is whole."""
    header = read_header(source)
    if header.metadata["general.architecture"] not in FAMILY.gguf:
        raise SystemExit(f"{source.name} is a {header.metadata['general.architecture']} model: only llama is written")
    folder.mkdir(parents=True, exist_ok=True)
    with open_model(source) as files:
        spec = files.spec
        names = FAMILY.hf_slots(spec, ())
        tensors = {
            names[slot].names[0]: _for_transformers(slot, dequantize(files.weights[slot]), spec)
            for slot in files.weights
        }
    _write_safetensors(folder / "model.safetensors", tensors)
    _write_tokenizer(folder, header)
    (folder / "config.json").write_text(json.dumps(_config(spec, header), indent=1))


def _for_transformers(slot: str, values: np.ndarray, spec: DecoderSpec) -> np.ndarray:
    """Rows of Q and K as transformers has them: the two halves of a rotation pair half a head apart, not side by side."""
    leaf = slot.rpartition(".")[2]
    if leaf not in ("q", "k"):
        return values
    heads = spec.n_heads if leaf == "q" else spec.n_kv_heads
    pairs = values.reshape(heads, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    head, data = {}, []
    offset = 0
    for name, values in tensors.items():
        raw = quantize(values, Format.BF16).data
        head[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [offset, offset + raw.nbytes]}
        offset += raw.nbytes
        data.append(raw)
    text = json.dumps({"__metadata__": {"format": "pt"}, **head}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for raw in data:
            file.write(raw)


def _write_tokenizer(folder: Path, header: GGUFHeader) -> None:
    info, document = convert_gguf(header)
    tokenizer = json.loads(document)
    tokenizer["added_tokens"] = [
        {"id": t.id, "content": t.content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for t in info.specials
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = {"bos_token": info.bos_token, "eos_token": info.eos_token, "chat_template": info.chat_template}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in named.items() if v}})
    )


def _config(spec: DecoderSpec, header: GGUFHeader) -> dict:
    meta = header.metadata
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": spec.d_model,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": meta.get("llama.rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_folder(args.source, args.folder)


if __name__ == "__main__":
    main()
