"""Tokenizers of model directories: the same ids as `tokenizers` gives for the untouched tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sagellm_core.text import load_chat_model, load_tokenizer
from sagellm_core.text.tokenizer import TextTokenizer
from sagellm_protocol.errors import ModelFileError
from sagellm_protocol.generation import ChatMessage, GenerationRequest

_CORPUS = [
    "the quick brown fox jumps over the lazy dog 0123456789",
    "Hello, world! héllo wörld ünïcödé 🙂",
    "a  b   c\n\nd\te",
] * 20
_SPECIALS = ["<s>", "</s>", "<|user|>", "<|end|>"]


def _finish(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken("<|end|>", rstrip=True, normalized=False), AddedToken("<|user|>", normalized=False)]
    )
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    """As qwen and llama 3: byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _finish(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=_SPECIALS[:2], initial_alphabet=alphabet, show_progress=False
        ),
    )
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return tokenizer


def _sentencepiece(tokenizer: Tokenizer) -> Tokenizer:
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *_SPECIALS[:2], *tokens], show_progress=False
    )
    _finish(tokenizer, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if not t["content"].startswith("<0x")]
    document["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(document))


def metaspace() -> Tokenizer:
    """As newer llama 2 files: ▁ before the first piece only, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _sentencepiece(tokenizer)


def prepended() -> Tokenizer:
    """As older llama 2 files: the normalizer puts ▁ before every piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _sentencepiece(tokenizer)


_MAKERS: dict[str, Callable[[], Tokenizer]] = {"byte-level": byte_level, "metaspace": metaspace, "prepended": prepended}


@pytest.fixture(scope="module", params=_MAKERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TextTokenizer]:
    """The library's tokenizer, and ours loaded from its file."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = _MAKERS[request.param]()
    write(folder, theirs)
    return theirs, load_tokenizer(folder, cache_dir=folder / "cache")


def write(folder: Path, tokenizer: Tokenizer, **files: Any) -> None:
    """Write a model directory without weights."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 512, "eos_token_id": 1})
    )
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


_PARTS = st.lists(
    st.one_of(
        st.sampled_from([*_SPECIALS, "<tool_call>", " ", "  ", "\n", "hello", "the quick", "ü", "🙂", "1"]),
        st.text(max_size=5),
    )
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=_PARTS)
def test_ids_are_the_librarys(pair: tuple[Tokenizer, TextTokenizer], parts: list[str]) -> None:
    """With special tokens parsed, any text gives the ids of the untouched file, with and without the added ones."""
    theirs, ours = pair
    text = "".join(parts).encode("utf-8", "ignore").decode()
    assert (
        ours.encode(text, add_special_tokens=False, parse_special=True)
        == theirs.encode(text, add_special_tokens=False).ids
    )
    if not text.startswith("<s>"):  # ours does not add what is there already
        assert ours.encode(text, parse_special=True) == theirs.encode(text).ids


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=_PARTS)
def test_text_comes_back(pair: tuple[Tokenizer, TextTokenizer], parts: list[str]) -> None:
    """User text holds no special tokens and reads back, also where it spells them."""
    _, ours = pair
    text = "".join(parts).encode("utf-8", "ignore").decode()
    ids = ours.encode(text, add_special_tokens=False)
    assert not ours.specials.ids.intersection(ids)
    # SentencePiece's files do not tell a leading space, or one behind an added token, from their own prefix.
    if ours.info.kind == "byte_level" or not (text.startswith(" ") or "▁" in text or "<tool_call>" in text):
        assert ours.decode(ids) == text


def test_companion_files_are_read(tmp_path: Path) -> None:
    """Template, special names and ends come from the files beside tokenizer.json; the jinja file wins."""
    template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    write(
        tmp_path,
        byte_level(),
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template},
        generation_config={"eos_token_id": [7], "temperature": 0.5},
    )
    model = load_chat_model(tmp_path, "m", cache_dir=tmp_path / "c")
    message = (ChatMessage(role="user", content="hello <|end|>"),)
    (request,) = model.prepare(GenerationRequest(request_id="r", model="m", messages=message)).engine_requests
    assert model.detokenize(request.prompt_token_ids) == "<s><|user|>hello <|end|><|end|>"
    specials = model.tokenizer.specials
    assert request.prompt_token_ids.count(specials["<|end|>"]) == 1
    assert set(request.eos_token_ids) >= {specials["</s>"], specials["<|end|>"], 7, 1}
    assert (model.context_length, model.sampling_defaults) == (512, {"temperature": 0.5})
    (tmp_path / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    model = load_chat_model(tmp_path, "m", cache_dir=tmp_path / "c")
    (request,) = model.prepare(GenerationRequest(request_id="r", model="m", messages=message)).engine_requests
    assert model.detokenize(request.prompt_token_ids) == "new hello <|end|>"


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, r"tokenizer\.json does not exist"),
        ("nonsense", "JSON"),
        ("{}", r"model\.vocab"),
        ('{"added_tokens": [{"content": 5}], "model": {"vocab": {}}}', "added_tokens"),
        ('{"added_tokens": 5, "model": {"vocab": {}}}', "added_tokens"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "zz"]]}}', "malformed"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content: str | None, fact: str) -> None:
    """A tokenizer.json that is missing or malformed is refused with the fact."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFileError, match=fact):
        load_tokenizer(tmp_path, cache_dir=tmp_path / "c")


@pytest.mark.model
def test_a_wordpiece_tokenizer_loads(minilm_model_path: Path) -> None:
    """The tokenizer of a BERT model gives the library's ids, with its frame."""
    theirs = Tokenizer.from_file(str(minilm_model_path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    ours = load_tokenizer(minilm_model_path)
    for text in ("The cat sits outside.", "ünïcödé 🙂 tokens", ""):
        assert ours.encode(text) == theirs.encode(text).ids
