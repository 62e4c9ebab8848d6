from __future__ import annotations

import json
from pathlib import Path

import pytest

from sagellm_core.text import TextChatModel, load_chat_model
from sagellm_core.text.embedding import encoder_limit
from sagellm_protocol.embedding import EmbeddingRequest, ScoreRequest
from sagellm_protocol.errors import ContextLengthError, InvalidArgumentError, ModelFileError
from sagellm_protocol.ports import EmbeddingModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "red", "a", "rose", "the", "sky", "##s"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A directory with a WordPiece tokenizer that pads and cuts, as embedding models ship it."""
    special = [
        {
            "id": i,
            "content": w,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, w in enumerate(WORDS[:4])
    ]
    one = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    end = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    document = {
        "version": "1.0",
        "truncation": {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 5}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*one, end],
            "pair": [*one, end, {"Sequence": {"id": "B", "type_id": 1}}, end],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {w: i for i, w in enumerate(WORDS)},
        },
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 40}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    return tmp_path


@pytest.fixture
def embedder(bert: Path, tmp_path: Path) -> TextChatModel:
    return load_chat_model(bert, "minilm", cache_dir=tmp_path / "cache")


def embedding(*inputs: object, **fields: object) -> EmbeddingRequest:
    return EmbeddingRequest(request_id="r", model="m", inputs=inputs, **fields)


def score(query: str, *documents: str, **fields: object) -> ScoreRequest:
    return ScoreRequest(request_id="r", model="m", query=query, documents=documents, **fields)


def test_texts_become_ids_with_special_tokens(embedder: TextChatModel) -> None:
    """A text gets the model's own special tokens, a list of ids is taken as it is; no padding, no silent cut."""
    assert isinstance(embedder, EmbeddingModel)
    assert embedder.context_length == 12
    got = embedder.prepare_embedding(embedding("what is red", "The SKYS", (2, 3), dimensions=3, normalize=False))
    assert got.inputs == ((2, 4, 5, 6, 3), (2, 9, 10, 11, 3), (2, 3))
    assert (got.dimensions, got.normalize, got.task, got.texts) == (3, False, "embed", ())
    assert embedder.prepare_embedding(embedding("a rose")).texts == ("a rose",)


def test_long_texts_are_refused_or_cut(embedder: TextChatModel) -> None:
    """An input beyond the context is refused with both numbers; with `truncate` it is cut before its last special token."""
    with pytest.raises(ContextLengthError, match=r"input\[1\] has 22 tokens, the model takes 12") as caught:
        embedder.prepare_embedding(embedding("a", "rose " * 20))
    assert caught.value.param == "input"
    (ids,) = embedder.prepare_embedding(embedding("rose " * 20, truncate=True)).inputs
    assert ids == (2, *[8] * 10, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "input is empty"),
        (("a", ""), r"input\[1\] is empty"),
        (((12,),), "token id 12"),
        (((),), r"input\[0\] is empty"),
    ],
)
def test_bad_inputs_are_refused(embedder: TextChatModel, inputs: tuple[object, ...], message: str) -> None:
    """No input, an empty one and an unknown token id are refused by place."""
    with pytest.raises(InvalidArgumentError, match=message):
        embedder.prepare_embedding(embedding(*inputs))


def test_pairs_for_a_cross_encoder(embedder: TextChatModel) -> None:
    """Query and document stand in one sequence with their separators and segments."""
    got = embedder.prepare_score(score("what is red", "a rose", "the sky"))
    assert got.inputs == ((2, 4, 5, 6, 3, 7, 8, 3), (2, 4, 5, 6, 3, 9, 10, 3))
    assert got.token_types == ((0,) * 5 + (1,) * 3,) * 2
    assert got.task == "classify"


def test_long_documents_are_refused_or_cut(embedder: TextChatModel) -> None:
    """A pair beyond the context is refused; with `truncate` the document is cut, never the query."""
    with pytest.raises(ContextLengthError, match=r"documents\[0\] has 26 tokens"):
        embedder.prepare_score(score("what is red", "rose " * 20))
    (ids,) = embedder.prepare_score(score("what is red", "rose " * 20, truncate=True)).inputs
    assert ids == (2, 4, 5, 6, 3, *[8] * 6, 3)
    with pytest.raises(ContextLengthError, match="the query has 22 tokens"):
        embedder.prepare_score(score("red " * 20, "rose", truncate=True))


@pytest.mark.parametrize(
    ("query", "documents", "param"), [(" ", ("a",), "query"), ("a", (), "documents"), ("a", ("b", " "), "documents")]
)
def test_empty_parts_are_refused(embedder: TextChatModel, query: str, documents: tuple[str, ...], param: str) -> None:
    """An empty query, no document and an empty document are refused by name."""
    with pytest.raises(InvalidArgumentError) as caught:
        embedder.prepare_score(score(query, *documents))
    assert caught.value.param == param


def test_a_chat_model_is_asked_yes_or_no(chat_model: TextChatModel) -> None:
    """A chat model gets one question for each document, and the tokens of yes and no are looked up."""
    chat_model.context_length = 2000
    got = chat_model.prepare_score(score("what is red?", "a rose", "the sky", instruction="colours"))
    assert got.task == "logprobs"
    assert len(got.target_ids) == 2
    assert [chat_model.detokenize([t]) for t in got.target_ids] == ["y", "n"]  # the small vocabulary has letters only
    text = chat_model.detokenize(got.inputs[1])
    for part in ("colours", "what is red?", "the sky"):
        assert part in text
    assert "rose" not in text


def test_a_long_document_is_cut_for_a_chat_model(chat_model: TextChatModel) -> None:
    """With `truncate` the document shrinks until the question fits; without, it is refused."""
    chat_model.context_length = 600
    with pytest.raises(ContextLengthError, match=r"documents\[0\]"):
        chat_model.prepare_score(score("what?", "é rose " * 200))
    (ids,) = chat_model.prepare_score(score("what?", "é rose " * 200, truncate=True)).inputs
    assert 550 <= len(ids) <= 600
    assert "Reply yes or no" in chat_model.detokenize(ids)


def test_limit_of_encoders(tmp_path: Path) -> None:
    """The limit is the positions that are left after roberta's offset, or sentence-transformers' lower one; else None."""
    assert encoder_limit(tmp_path, {"model_type": "llama"}) is None
    config = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert encoder_limit(tmp_path, config) == 512
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    assert encoder_limit(tmp_path, config) == 128
    (tmp_path / "sentence_bert_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="sentence_bert_config"):
        encoder_limit(tmp_path, config)
    with pytest.raises(ModelFileError, match="max_position_embeddings"):
        encoder_limit(tmp_path / "none", {"model_type": "bert"})
