"""ChatModel.prepare: ids, seeds, budgets and refusals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_core.text import TextChatModel, load_chat_model
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_core.text.chat_model import derived_seed
from sagellm_protocol.errors import ContextLengthError, InvalidArgumentError, ModelFileError, UnsupportedError
from sagellm_protocol.generation import ChatMessage, GenerationRequest
from sagellm_protocol.ports import ChatModel
from sagellm_protocol.sampling import SamplingParams


def _chat(content: str = "hello", **changes: Any) -> GenerationRequest:
    messages = (ChatMessage(role="user", content=content),)
    return GenerationRequest(**{"request_id": "r", "model": "m", "messages": messages} | changes)


def test_it_is_the_port(chat_model: TextChatModel) -> None:
    """Both chat models can stand where the protocol's port is wanted."""
    ports: list[ChatModel] = [chat_model, ByteChatModel("m", 10)]
    assert [(port.model_id, port.context_length) for port in ports] == [("small", 256), ("m", 10)]


def test_a_chat_becomes_ids(chat_model: TextChatModel) -> None:
    """Template tokens are ids, the user's own spelling of them is text, and all of it reads back."""
    (request,) = chat_model.prepare(_chat("hello <|im_end|>")).engine_requests
    text = "<|im_start|>user\nhello <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert chat_model.detokenize(request.prompt_token_ids) == text
    assert request.prompt_token_ids.count(2) == 1
    assert request.eos_token_ids == (0, 2)
    assert (request.request_id, request.source) == ("r", _chat("hello <|im_end|>"))


def test_a_raw_prompt_is_its_own_template(chat_model: TextChatModel) -> None:
    """Control tokens in a raw prompt are parsed, the beginning of sequence is added once, ids are taken as they are."""
    ids = chat_model.prepare(_chat(messages=None, prompt="<|im_start|>hello")).engine_requests[0].prompt_token_ids
    assert ids[:2] == (0, 1)
    twice = chat_model.prepare(_chat(messages=None, prompt="<|endoftext|>hello")).engine_requests[0].prompt_token_ids
    assert twice.count(0) == 1
    raw = chat_model.prepare(_chat(messages=None, prompt=(5, 6))).engine_requests[0]
    assert raw.prompt_token_ids == (5, 6)


def test_tokenize_keeps_control_tokens_text(chat_model: TextChatModel) -> None:
    """Special tokens written in text stay text unless asked for; user-defined tokens are part of the text."""
    assert 1 not in chat_model.tokenize("<|im_start|>")
    assert chat_model.tokenize("<|im_start|>", parse_special=True) == [0, 1]
    assert len(chat_model.tokenize("<tool>", add_special_tokens=False)) == 1
    assert chat_model.detokenize(chat_model.tokenize("a <tool> ü"), skip_special_tokens=True) == "a <tool> ü"


def test_seeds_and_budgets_are_resolved(chat_model: TextChatModel) -> None:
    """A missing seed is drawn, a missing max_tokens is what the context leaves, and choices get seeds of their own."""
    first, second = (chat_model.prepare(_chat()).engine_requests[0] for _ in range(2))
    assert first.sampling.seed is not None
    assert first.sampling.seed != second.sampling.seed
    assert first.sampling.max_tokens == 256 - len(first.prompt_token_ids)
    many = chat_model.prepare(_chat(n=3, sampling=SamplingParams(seed=-5, max_tokens=7))).engine_requests
    assert [r.request_id for r in many] == ["r/0", "r/1", "r/2"]
    assert many[0].sampling.seed == -5
    assert len({r.sampling.seed for r in many}) == 3
    assert all(r.sampling.max_tokens == 7 and r.prompt_token_ids == many[0].prompt_token_ids for r in many)


def test_derived_seeds_are_signed_and_distinct() -> None:
    """Seeds of choices fit 64 bits and do not repeat."""
    seeds = [derived_seed(seed, k) for seed in (0, 1, -(2**63), 2**63 - 1) for k in range(200)]
    assert all(-(2**63) <= s < 2**63 for s in seeds)
    assert len(set(seeds)) == len(seeds)


def test_a_prompt_that_does_not_fit_is_refused(chat_model: TextChatModel) -> None:
    """The error has the prompt's tokens, the context's and the cure; the last token that fits is accepted."""
    with pytest.raises(ContextLengthError, match=r"256.*shorten"):
        chat_model.prepare(_chat("x" * 300))
    prompt = len(chat_model.prepare(_chat()).engine_requests[0].prompt_token_ids)
    chat_model.prepare(_chat(sampling=SamplingParams(max_tokens=256 - prompt)))
    with pytest.raises(
        ContextLengthError, match=rf"{prompt} tokens and {257 - prompt} .* 256: lower max_tokens to {256 - prompt}"
    ):
        chat_model.prepare(_chat(sampling=SamplingParams(max_tokens=257 - prompt)))


def test_a_text_that_cannot_fit_is_not_tokenised(chat_model: TextChatModel) -> None:
    """A text of many megabytes is refused at once, by what it has at least."""
    for request in (_chat("x" * 20_000_000), _chat(messages=None, prompt="x" * 20_000_000)):
        start = time.thread_time()
        with pytest.raises(ContextLengthError, match=r"20000\d+ characters, at least 1\d+ tokens; .* 256: shorten"):
            chat_model.prepare(request)
        assert time.thread_time() - start < 5.0


def test_only_a_beginning_that_does_not_fit_is_enough(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """A text is refused by its beginning only when that alone does not fit; else its tokens are counted."""
    path = write_vocabulary(tokenizer__ggml__merges=["h e", "l l", "ll o", "he llo"], llama__context_length=64)
    model = load_chat_model(path, "m", cache_dir=tmp_path / "cache")
    assert model.prepare(_chat(messages=None, prompt="hello" * 60)).engine_requests
    with pytest.raises(ContextLengthError, match=r"the prompt has 1\d{3} characters, at least"):
        model.prepare(_chat(messages=None, prompt="x" * 1000))
    with pytest.raises(ContextLengthError, match="the prompt has 301 tokens"):
        model.prepare(_chat(messages=None, prompt="x" * 300))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": ()}, "messages"),
        ({"messages": None}, "messages"),
        ({"prompt": "both"}, "messages"),
        ({"messages": None, "prompt": ()}, "prompt"),
        ({"messages": None, "prompt": (100000,)}, "prompt"),
        ({"messages": None, "prompt": (-1,)}, "prompt"),
        ({"continue_final": True}, "messages"),
        ({"messages": None, "prompt": "x", "continue_final": True}, "continue_final"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"sampling": SamplingParams(stop_token_ids=(999999,))}, "stop_token_ids"),
        ({"sampling": SamplingParams(allowed_token_ids=(-1,))}, "allowed_token_ids"),
        ({"sampling": SamplingParams(logit_bias={999999: 1.0})}, "logit_bias"),
    ],
)
def test_wrong_requests_name_the_field(chat_model: TextChatModel, changes: dict[str, Any], param: str) -> None:
    """Every refusal names the field that is at fault."""
    with pytest.raises(InvalidArgumentError) as caught:
        chat_model.prepare(_chat(**changes))
    assert caught.value.param == param


def test_bad_words_become_ids(chat_model: TextChatModel) -> None:
    """Each bad word is spelled as tokens, at the start of a text and after a space."""
    (request,) = chat_model.prepare(_chat(sampling=SamplingParams(bad_words=("w",)))).engine_requests
    assert {chat_model.detokenize(ids) for ids in request.bad_token_ids} == {"w", " w"}


def test_a_base_model_has_no_chat(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """Messages to a model without a template are refused, completions work."""
    path = write_vocabulary(tokenizer__ggml__token_type=[1] * 267)
    model = load_chat_model(path, "base", cache_dir=tmp_path)
    with pytest.raises(UnsupportedError, match="no chat template"):
        model.prepare(_chat())
    assert model.prepare(_chat(messages=None, prompt="hello")).engine_requests


def test_the_context_can_be_smaller_than_the_models(write_vocabulary: Callable[..., Path], tmp_path: Path) -> None:
    """A smaller context is taken over, a larger one refused with both numbers."""
    path = write_vocabulary()
    assert load_chat_model(path, "m", 128, cache_dir=tmp_path).context_length == 128
    with pytest.raises(InvalidArgumentError, match=r"257.*256"):
        load_chat_model(path, "m", 257, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"tokenizer__ggml__model": None}, "no tokenizer"),
        ({"tokenizer__ggml__model": "wordpiece"}, "wordpiece"),
        ({"tokenizer__ggml__pre": "martian"}, "martian.*llama-bpe"),
        ({"tokenizer__ggml__tokens": None}, "incomplete"),
        ({"tokenizer__ggml__tokens": 5}, "incomplete"),
        ({"tokenizer__ggml__merges": None}, "incomplete"),
        ({"tokenizer__ggml__merges": ["h zz"]}, "not made of tokens"),
        ({"tokenizer__ggml__merges": [1, 2]}, "numbers where text"),
        ({"tokenizer__ggml__token_type": [1]}, "token types"),
        ({"tokenizer__ggml__eos_token_id": 100000}, "outside of the vocabulary"),
        ({"tokenizer__ggml__model": "llama"}, "scores"),
        ({"llama__context_length": None}, "context length"),
    ],
)
def test_malformed_vocabularies_are_named(
    write_vocabulary: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], fact: str
) -> None:
    """A vocabulary that is incomplete or contradicts itself is refused with the fact."""
    with pytest.raises(ModelFileError, match=fact):
        load_chat_model(write_vocabulary(**changes), "m", cache_dir=tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutated_vocabulary_raises_anything_else(
    write_vocabulary: Callable[..., Path], tmp_path: Path, data: st.DataObject
) -> None:
    """A vocabulary with any bytes changed or cut off loads and encodes, or is refused as ModelFileError."""
    path = write_vocabulary()
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        patch = data.draw(st.binary(min_size=1, max_size=9))
        if data.draw(st.booleans()):
            content[at : at + len(patch)] = patch
        else:
            del content[at : at + len(patch)]
    path.write_bytes(content)
    with contextlib.suppress(ModelFileError):
        model = load_chat_model(path, "m", cache_dir=tmp_path / "cache")
        with contextlib.suppress(InvalidArgumentError):
            model.prepare(_chat("hello <|im_end|> ü"))


def test_byte_model_round_trips() -> None:
    """The mock's vocabulary spells any text in bytes and templates like ChatML."""
    model = ByteChatModel("mock", 4096)
    (request,) = model.prepare(_chat("hé 🙂")).engine_requests
    want = "<|bos|><|im_start|>user\nhé 🙂<|im_end|>\n<|im_start|>assistant\n"
    assert model.detokenize(request.prompt_token_ids) == want
    assert request.prompt_token_ids[0] == 256
    assert msgspec.json.decode(msgspec.json.encode(request), type=type(request)) == request
