"""Tokenisation of the default models equals llama.cpp's, recorded by tests/tools/record_tokens.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.text import load_chat_model, load_tokenizer
from sagellm_protocol.generation import ChatMessage, GenerationRequest

pytestmark = pytest.mark.model

_DATA = Path(__file__).parent / "data"


def _entries(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((_DATA / f"tokens-{name}.json").read_text())["entries"]
    assert len(entries) > 100
    return entries


def test_smollm2_ids_and_text(default_model_path: Path) -> None:
    """A byte-level vocabulary gives the recorded ids for texts of many scripts, and reads them back exactly."""
    tokenizer = load_tokenizer(default_model_path)
    for entry in _entries("smollm2"):
        assert tokenizer.encode(entry["text"], add_special_tokens=False) == entry["ids"], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["text"]


def test_gemma3_ids_and_text(gemma_model_path: Path) -> None:
    """A SentencePiece vocabulary gives the recorded ids; only ▁ itself, which stands for a space, reads back as one."""
    tokenizer = load_tokenizer(gemma_model_path)
    for entry in _entries("gemma3"):
        assert tokenizer.encode(entry["text"], add_special_tokens=False) == entry["ids"], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["text"].replace("\u2581", " ")


def test_chat_of_the_default_model(default_model_path: Path) -> None:
    """The model's own template adds its system message and opens the assistant's turn."""
    model = load_chat_model(default_model_path, "smollm2")
    messages = (ChatMessage(role="user", content="What is the capital of France?"),)
    (request,) = model.prepare(GenerationRequest(request_id="r", model="m", messages=messages)).engine_requests
    assert model.detokenize(request.prompt_token_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.sampling.max_tokens == 8192 - len(request.prompt_token_ids)
