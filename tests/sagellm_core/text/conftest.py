"""A small byte-level vocabulary in a GGUF file, with control and user-defined tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.loader.gguf_write import write_gguf
from sagellm_core.text import TextChatModel, load_chat_model
from sagellm_core.text.tokenizer import byte_of_char

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]"]


def _metadata(more: Sequence[str]) -> dict[str, Any]:
    controls = [*CONTROLS, *more]
    letters = [char for char, _ in sorted(byte_of_char().items(), key=lambda item: item[1])]
    merged = ["he", "ll", "llo", "hello", "Ġw", "Ġ1"]
    merges = ["h e", "l l", "ll o", "he llo", "Ġ w", "Ġ 1"]
    tokens = [*controls, *letters, *merged, "<tool>"]
    types = [3] * len(controls) + [1] * (len(letters) + len(merged)) + [4]
    return {
        "general.architecture": "llama", "llama.context_length": 256, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip


@pytest.fixture
def write_vocabulary(tmp_path: Path) -> Callable[..., Path]:
    """Write a vocabulary-only GGUF file with more control tokens and changed metadata (None removes a key), return its path."""

    def write(*more_controls: str, **changes: Any) -> Path:
        metadata = _metadata(more_controls)
        for key, value in changes.items():
            full = key.replace("__", ".")
            if value is None:
                metadata.pop(full, None)
            else:
                metadata[full] = value
        path = tmp_path / "vocabulary.gguf"
        write_gguf(path, metadata, {})
        return path

    return write


@pytest.fixture
def chat_model(write_vocabulary: Callable[..., Path], tmp_path: Path) -> TextChatModel:
    """A chat model over the small vocabulary; its template is the built-in ChatML."""
    return load_chat_model(write_vocabulary(), "small", cache_dir=tmp_path / "cache")
