"""Prompts that ask for what stands in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.text import TextChatModel, load_chat_model
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_protocol.errors import ContextLengthError, UnsupportedError
from sagellm_protocol.generation import ChatMessage, GenerationRequest

FIRST = 4  # id of the first control token that a test adds
FAMILIES = {
    "qwen": (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], "{0}he{1}llo{2}"),
    "starcoder": (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], "{0}he{1}llo{2}"),
    "deepseek": (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], "{0}he{1}llo{2}"),
    "codestral": (["[PREFIX]", "[SUFFIX]"], "{1}llo{0}he"),
}


def request(prompt: Any = "he", suffix: str = "llo", **changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"request_id": "r", "model": "m", "prompt": prompt, "suffix": suffix} | changes)


@pytest.fixture
def model_with(write_vocabulary: Callable[..., Path], tmp_path: Path) -> Callable[..., TextChatModel]:
    """Return a chat model whose vocabulary has these control tokens besides the usual ones."""

    def make(controls: list[str], **changes: Any) -> TextChatModel:
        path = write_vocabulary(*controls, **changes)
        return load_chat_model(path, "small", cache_dir=tmp_path / "cache")

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_order(model_with: Callable[..., TextChatModel], family: str) -> None:
    """The beginning of sequence comes first, then the parts in the family's own order and spelling."""
    controls, shape = FAMILIES[family]
    model = model_with(controls)
    (prepared,) = model.prepare(request()).engine_requests
    assert model.detokenize(prepared.prompt_token_ids) == "<|endoftext|>" + shape.format(*controls)


def test_the_file_may_name_the_tokens(model_with: Callable[..., TextChatModel]) -> None:
    """Ids in the metadata count, whatever the tokens are called, in the long and in the short names of converters."""
    for names in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
        ids = {f"tokenizer__ggml__{name}_token_id": FIRST + k for k, name in enumerate(names)}
        model = model_with(["<a>", "<b>", "<c>"], **ids)
        (prepared,) = model.prepare(request()).engine_requests
        assert model.detokenize(prepared.prompt_token_ids) == "<|endoftext|><a>he<b>llo<c>"


def test_both_sides_are_text(model_with: Callable[..., TextChatModel]) -> None:
    """Control tokens spelled before or after the gap stay text; ids before it are taken as they are."""
    controls, _ = FAMILIES["qwen"]
    model = model_with(controls)
    (prepared,) = model.prepare(request("<|fim_middle|>", "<|im_end|>")).engine_requests
    assert [i for i in prepared.prompt_token_ids if i < FIRST + 3] == [0, FIRST, FIRST + 1, FIRST + 2]
    (prepared,) = model.prepare(request((40, 41))).engine_requests
    assert prepared.prompt_token_ids[:4] == (0, FIRST, 40, 41)
    (prepared,) = model.prepare(request("")).engine_requests
    assert prepared.prompt_token_ids[:3] == (0, FIRST, FIRST + 1)


def test_more_tokens_end_it(model_with: Callable[..., TextChatModel]) -> None:
    """A token that begins another file ends what fills a gap, and no other answer."""
    model = model_with([*FAMILIES["qwen"][0], "<|file_sep|>"])
    separator = model.tokenizer.id_of("<|file_sep|>")
    assert separator in model.prepare(request()).engine_requests[0].eos_token_ids
    assert separator not in model.prepare(request(suffix="")).engine_requests[0].eos_token_ids


def test_what_cannot_be_filled_is_refused(chat_model: TextChatModel) -> None:
    """A model without such tokens, a chat, and parts that do not fit together are refused by name."""
    with pytest.raises(UnsupportedError, match="small") as failure:
        chat_model.prepare(request())
    assert failure.value.param == "suffix"
    model = ByteChatModel("mock", 64)
    with pytest.raises(UnsupportedError, match="messages"):
        model.prepare(request(None, messages=(ChatMessage(role="user", content="a"),)))
    with pytest.raises(ContextLengthError, match="64"):
        model.prepare(request("a" * 30, "b" * 40))
