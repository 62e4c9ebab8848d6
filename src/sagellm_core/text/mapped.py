"""The encoder of byte-pair vocabularies over a table in the cache (`native/bpe.cpp`).

`tokenizers` builds its hash tables anew at every start: 0.1 s and 20 MB for 49,000 tokens, 0.9 s and 150 MB for 256,000. Here they lie
in a file. How a text is cut into words is still decided by `tokenizers`, from the same tokenizer.json without its vocabulary; it is
imported with the first text that needs it. A tokenizer that this cannot express, or an installation without the compiled part, goes to
`HFEncoder` as a whole.
"""

from __future__ import annotations

import struct
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from sagellm_core.text.specials import SpecialToken, SpecialTokens

if TYPE_CHECKING:
    from sagellm_core.text._bpe import Table

__all__ = ["KIND", "MappedEncoder", "compact", "is_mapped"]

_MAGIC = b"sagellm table of merges 1\0\0\0\0\0\0\0"
_HEAD = struct.Struct("<II")
_TABLE_VERSION = 0x31455042

try:
    from sagellm_core.text import _bpe
except ImportError:
    _usable = False
else:
    _usable = getattr(_bpe, "VERSION", 0) == _TABLE_VERSION  # else a build of before

KIND = _MAGIC if _usable else b"tokenizer.json"
"""What `compact` makes here: part of a cache entry's key."""


class _Shell(msgspec.Struct, frozen=True, kw_only=True):
    """What lies beside the table: the texts that are cut out first, and how the rest becomes words."""

    literals: dict[str, int]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None


def is_mapped(document: bytes | memoryview) -> bool:
    """Whether `document` is one of `compact`."""
    return document[: len(_MAGIC)] == _MAGIC


def compact(document: bytes) -> bytes | None:
    """Return a tokenizer.json as a table and its shell; None where it has something that `MappedEncoder` does not do."""
    if not _usable:
        return None
    whole = msgspec.json.decode(document)
    model, literals = whole.get("model") or {}, whole.get("added_tokens") or []
    plain = (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not any(token.get(key) for token in literals for key in ("single_word", "lstrip", "rstrip", "special"))
        and (whole.get("normalizer") is None or not any(token.get("normalized") for token in literals))
        and len({bool(token.get("normalized")) for token in literals}) <= 1
    )
    vocab = model.get("vocab")
    if not plain or not vocab or any(vocab.get(token["content"]) != token["id"] for token in literals):
        return None
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in vocab:
        return None
    try:
        table = _bpe.build(
            vocab,
            model.get("merges") or [],
            bool(model.get("byte_fallback")),
            bool(model.get("fuse_unk")),
            bool(model.get("ignore_merges")),
            -1 if unknown is None else vocab[unknown],
        )
    except ValueError:
        return None
    shell = msgspec.json.encode(
        _Shell(
            literals={token["content"]: token["id"] for token in literals},
            normalizer=whole.get("normalizer"),
            pre_tokenizer=whole.get("pre_tokenizer"),
        )
    )
    start = -(-(len(_MAGIC) + _HEAD.size + len(shell)) // 64) * 64
    head = _MAGIC + _HEAD.pack(len(shell), start) + shell
    return head.ljust(start, b"\0") + table


class MappedEncoder:
    """Encodes plain text by a document of `compact`. Safe to use from threads."""

    def __init__(self, document: bytes | memoryview) -> None:
        length, start = _HEAD.unpack_from(document, len(_MAGIC))
        begin = len(_MAGIC) + _HEAD.size
        self._shell = msgspec.json.decode(document[begin : begin + length], type=_Shell)
        self._literals = SpecialTokens(SpecialToken(i, text) for text, i in self._shell.literals.items())
        self._table: Table = _bpe.Table(memoryview(document)[start:])

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        out: list[int] = []
        for piece in self._literals.split(text):
            if isinstance(piece, int):
                out.append(piece)
            else:
                out += self._table.encode(self._words(piece))
        return out

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, None for an unused id."""
        return self._table.token(token_id) if token_id >= 0 else None

    def _words(self, text: str) -> list[str]:
        replaced = self._replacement
        if replaced is not None:
            return [text.replace(*replaced)]
        normalizer, cutter = self._library
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        return [word for word, _ in cutter.pre_tokenize_str(text)] if cutter is not None else [text]

    @cached_property
    def _replacement(self) -> tuple[str, str] | None:
        """SentencePiece's: spaces become ▁, and the whole text is one word. None for anything else."""
        step = self._shell.normalizer
        if step is None or self._shell.pre_tokenizer is not None or step.get("type") != "Replace":
            return None
        pattern, content = step.get("pattern", {}).get("String"), step.get("content")
        return (pattern, content) if pattern and isinstance(content, str) else None

    @cached_property
    def _library(self) -> tuple[Any, Any]:
        """Normalizer and pre-tokenizer of `tokenizers`."""
        from tokenizers import Tokenizer

        shell: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": self._shell.normalizer,
            "pre_tokenizer": self._shell.pre_tokenizer,
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
        library = Tokenizer.from_buffer(msgspec.json.encode(shell))
        return library.normalizer, library.pre_tokenizer
