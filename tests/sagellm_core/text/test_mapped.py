"""Byte-pair encoding from a mapped table: the ids of `tokenizers`, and a way back where it cannot do what a file asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core.text import mapped
from sagellm_core.text.hf_encoder import HFEncoder
from sagellm_core.text.mapped import MappedEncoder, compact, is_mapped

pytest.importorskip("sagellm_core.text._bpe", reason="the compiled part is not installed")

_LETTERS = "abcdé▁ "
_TEXT = st.text(st.sampled_from([*_LETTERS, "x", "🙂", "ü", "\n"]), max_size=40)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A byte-pair tokenizer.json over a few letters: merges in any order, also pairs that spell one token in two ways."""
    tokens = list(_LETTERS)
    merges: list[str] = []
    for _ in range(draw(st.integers(0, 30))):
        plain = [token for token in tokens if " " not in token]
        left, right = draw(st.sampled_from(plain)), draw(st.sampled_from(plain))
        merges.append(f"{left} {right}")
        if left + right not in tokens:
            tokens.append(left + right)
    tokens += ["<unk>", "<lit>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab["<lit>"], "content": "<lit>", **flags}],
        "normalizer": draw(st.sampled_from([None, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}])),
        "pre_tokenizer": draw(
            st.sampled_from(
                [None, {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}]
            )
        ),
        "model": {
            "type": "BPE",
            "unk_token": draw(st.sampled_from([None, "<unk>"])),
            "fuse_unk": draw(st.booleans()),
            "byte_fallback": draw(st.booleans()),
            "ignore_merges": draw(st.booleans()),
            "vocab": vocab,
            "merges": merges,
        },
    }


@given(documents(), st.lists(st.one_of(_TEXT, st.just("<lit>")), max_size=4))
def test_ids_are_those_of_the_library(document: dict[str, Any], parts: list[str]) -> None:
    """Any vocabulary and any text gives the ids, and the tokens, that `tokenizers` gives."""
    raw = json.dumps(document).encode()
    packed = compact(raw)
    assert packed is not None
    assert is_mapped(packed)
    ours, theirs = MappedEncoder(memoryview(packed)), HFEncoder(raw)
    text = "".join(parts)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    size = len(document["model"]["vocab"])
    assert [ours.token(i) for i in range(size + 2)] == [theirs.token(i) for i in range(size + 2)]


def _document(**model: Any) -> dict[str, Any]:
    base = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": base | model}


@pytest.mark.parametrize(
    "document",
    [
        _document(type="WordLevel"),
        _document(dropout=0.1),
        _document(end_of_word_suffix="</w>"),
        _document(merges=["a c"]),
        _document(merges=["a b c"]),
        _document(vocab={"a": 0, "b": 0}),
        _document(vocab={"a": 0, "b": 1 << 30}),
        _document(unk_token="?"),
        {**_document(), "added_tokens": [{"id": 2, "content": "ab", "lstrip": True}]},
        {**_document(), "added_tokens": [{"id": 7, "content": "new"}]},
    ],
)
def test_what_it_cannot_do_is_left_to_the_library(document: dict[str, Any]) -> None:
    """Another kind of model, or one with what a table does not hold, is not compacted."""
    assert compact(json.dumps(document).encode()) is None


@pytest.mark.parametrize("damage", [0, 3, 40, -4])
def test_a_table_of_another_size_is_refused(damage: int) -> None:
    """A table that is cut is no table, whatever its head says."""
    packed = compact(json.dumps(_document()).encode())
    assert packed is not None
    start = mapped._HEAD.unpack_from(packed, len(mapped._MAGIC))[1]
    table = packed[start:]
    with pytest.raises(ValueError, match="no table"):
        mapped._bpe.Table(table[:damage] if damage else b"")


def test_without_the_compiled_part_the_library_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that lacks the extension compacts nothing."""
    monkeypatch.setattr(mapped, "_usable", False)
    assert compact(json.dumps(_document()).encode()) is None
