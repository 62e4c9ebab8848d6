"""Text <-> token ids. The vocabulary is `TokenizerInfo` plus an encoder; specials are handled here, never by the encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, Protocol

import msgspec

from sagellm_core.text.specials import SpecialToken, SpecialTokens

__all__ = ["Encoder", "TextTokenizer", "TokenizerInfo", "byte_of_char"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """All that text handling needs of a vocabulary besides the encoder itself; kept in the cache beside it.

    Attributes:
        kind: how tokens spell bytes: GPT-2's printable stand-ins, SentencePiece's ▁ and <0xXX>, or raw text.
        vocab_size: highest id + 1.
        longest_token: characters of the longest token, at least: a text of n characters has n / longest_token tokens or more.
        specials: control tokens.
        literals: tokens whose text is taken as it is (user-defined ones).
        prefix_ids, suffix_ids: what `add_special_tokens` puts around a text.
        eos_token_ids: ids that end an answer.
        space_prefix: a space is put before a text: ``always`` (SentencePiece's dummy prefix) or where it is ``missing``.
        own_prefix: the encoder itself puts it, before every piece of plain text.
        bos_token, eos_token, pad_token, unk_token: text, for templates; empty where there is none.
        chat_template: Jinja source, or None.
        tool_template: the template for requests with tools, where a file has one of its own.
        infill_ids: control tokens before, after and at the gap of a text to fill in, where the file names them.
        family: a hint for parsers: the architecture.
    """

    kind: Literal["byte_level", "metaspace", "raw"]
    vocab_size: int
    longest_token: int = 1
    specials: tuple[SpecialToken, ...] = ()
    literals: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    space_prefix: Literal["no", "always", "missing"] = "no"
    own_prefix: bool = False
    bos_token: str = ""
    eos_token: str = ""
    pad_token: str = ""
    unk_token: str = ""
    chat_template: str | None = None
    tool_template: str | None = None
    infill_ids: tuple[int, int, int] | None = None
    family: str = ""


class Encoder(Protocol):
    """Plain text -> ids, ids -> vocabulary strings. Knows no special tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        ...

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, None for an unused id."""
        ...


class TextTokenizer:
    """Encodes with or without special tokens, and knows the bytes of every token."""

    def __init__(self, info: TokenizerInfo, encoder: Encoder) -> None:
        self.info, self._encoder = info, encoder
        self.specials = SpecialTokens(info.specials)
        self._special_text = {token.id: token.content.encode() for token in info.specials}
        self._literals = frozenset(info.literals)
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Ids lie below it."""
        return self.info.vocab_size

    @cached_property
    def marks(self) -> frozenset[str]:
        """Texts of all control and user-defined tokens."""
        return frozenset([*(token.content for token in self.info.specials), *self._literal_texts])

    def id_of(self, text: str) -> int | None:
        """Return the id of the control or user-defined token that is spelled so; None if there is none."""
        found = self.specials.get(text)
        return self._literal_ids.get(text) if found is None else found

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Text -> ids; special tokens written in `text` stay text unless `parse_special`."""
        ids = self.encode_pieces(list(self.specials.split(text)) if parse_special else [text])
        if not add_special_tokens:
            return ids
        prefix, suffix = list(self.info.prefix_ids), list(self.info.suffix_ids)
        if prefix and ids[: len(prefix)] == prefix:
            prefix = []
        return [*prefix, *ids, *suffix]

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Pieces of plain text and ids of special tokens -> ids."""
        out: list[int] = []
        for index, piece in enumerate(pieces):
            if isinstance(piece, int):
                out.append(piece)
            elif piece:
                prefixed = index == 0 and self._wants_space(piece)
                out += self._encoder.encode(f" {piece}" if prefixed else piece)
        return out

    def _wants_space(self, text: str) -> bool:
        how = self.info.space_prefix
        if how == "no" or text.startswith(self._literal_texts):
            return False
        return how == "always" or not text.startswith((" ", _SPACE))

    @cached_property
    def _literal_ids(self) -> dict[str, int]:
        return {self.token_bytes(i).decode("utf-8", "replace"): i for i in self.info.literals}

    @cached_property
    def _literal_texts(self) -> tuple[str, ...]:
        return tuple(self._literal_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token spells; special tokens spell their name, unused ids nothing."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
        specials = self.specials.ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(t) for t in token_ids if t not in specials)
        text = data.decode("utf-8", "replace")
        first = next((t for t in token_ids if t not in self.specials.ids), None)
        prefixed = self.info.space_prefix != "no" or self.info.own_prefix
        starts = prefixed and first is not None and self.token_bytes(first).startswith(b" ")
        return text.replace(" ", "", 1) if starts else text

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._special_text:
            return self._special_text[token_id]
        token = self._encoder.token(token_id)
        if token is None:
            return b""
        if self.info.kind == "raw" or token_id in self._literals:
            return token.encode()
        if self.info.kind == "byte_level":
            table = byte_of_char()
            return b"".join(bytes([table[c]]) if c in table else c.encode() for c in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()


_BYTE_OF_CHAR: dict[str, int] = {}


def byte_of_char() -> dict[str, int]:
    """GPT-2's stand-in character -> byte: printable Latin-1 stands for itself, the rest for U+0100 upwards."""
    if not _BYTE_OF_CHAR:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        table = {chr(byte): byte for byte in printable}
        rest = [byte for byte in range(256) if byte not in set(printable)]
        _BYTE_OF_CHAR.update(table | {chr(0x100 + index): byte for index, byte in enumerate(rest)})
    return _BYTE_OF_CHAR
