"""Recommended sampling: where it is found, and that nonsense in it is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sagellm_core.text import load_chat_model
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_protocol.errors import ModelFileError


def test_metadata_comes_before_the_file_beside(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """GGUF metadata is taken, else generation_config.json beside the file, else nothing."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 64, "eos_token_id": 2}))
    path = write_vocabulary(general__sampling__temp=0.25, general__sampling__penalty_repeat=1.5)
    model = load_chat_model(path, "m", cache_dir=tmp_path)
    assert model.sampling_defaults == {"temperature": 0.25, "repetition_penalty": 1.5}
    model = load_chat_model(write_vocabulary(), "m", cache_dir=tmp_path)
    assert model.sampling_defaults == {"temperature": 0.5, "top_k": 64}
    (tmp_path / "generation_config.json").unlink()
    assert load_chat_model(write_vocabulary(), "m", cache_dir=tmp_path).sampling_defaults == {}
    assert ByteChatModel("m", 10).sampling_defaults == {}


def test_greedy_and_nonsense(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """do_sample false is greedy, values out of range are left out, a file that is no JSON is an error."""
    path, file = write_vocabulary(), tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    assert load_chat_model(path, "m", cache_dir=tmp_path).sampling_defaults == {"temperature": 0.0}
    file.write_text(json.dumps({"temperature": 9, "top_p": "x", "top_k": True, "min_p": 0.1}))
    assert load_chat_model(path, "m", cache_dir=tmp_path).sampling_defaults == {"min_p": 0.1}
    file.write_text("nonsense")
    with pytest.raises(ModelFileError, match="JSON"):
        load_chat_model(path, "m", cache_dir=tmp_path)
