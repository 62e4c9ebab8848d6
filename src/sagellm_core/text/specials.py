"""Special tokens: found where a template put them, and kept out of what a user typed.

Two tools. `SpecialTokens.split` cuts text at special tokens. `Guard` marks user strings before they enter a chat template, so
that a special token typed by a user is no longer one when the rendered text is cut; the marks are removed afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

__all__ = ["Guard", "SpecialToken", "SpecialTokens"]

_PRIVATE_USE = range(0xE000, 0xF900)
_PRIVATE = re.compile("[\ue000-\uf8ff]")
# Unicode's White_Space, which `tokenizers` strips; Python's own notion has four separators more.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class SpecialToken(msgspec.Struct, frozen=True, omit_defaults=True):
    """A control token. `lstrip` and `rstrip` swallow the white space before and behind it."""

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False


class SpecialTokens:
    """The control tokens of a vocabulary. Looking for them costs time linear in the text."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        self._by_text = {token.content: token for token in tokens if token.content}
        self.ids = frozenset(token.id for token in self._by_text.values())
        self._lengths = sorted({len(text) for text in self._by_text}, reverse=True)
        first = "".join(sorted({text[0] for text in self._by_text}))
        self._candidates = re.compile(f"[{re.escape(first)}]") if first else None
        self._edges: tuple[frozenset[str], frozenset[str]] | None = None

    def __getitem__(self, text: str) -> int:
        return self._by_text[text].id

    def get(self, text: str) -> int | None:
        """Return a token's id, None if `text` is not one."""
        token = self._by_text.get(text)
        return None if token is None else token.id

    def __contains__(self, text: object) -> bool:
        return text in self._by_text

    def __iter__(self) -> Iterator[SpecialToken]:
        return iter(self._by_text.values())

    def find(self, text: str, start: int = 0) -> Iterator[tuple[int, SpecialToken]]:
        """Every place from `start` where a special token begins, with the longest one there; they may overlap."""
        if self._candidates is None:
            return
        for match in self._candidates.finditer(text, start):
            at = match.start()
            for length in self._lengths:
                token = self._by_text.get(text[at : at + length])
                if token is not None:
                    yield at, token
                    break

    def split(self, text: str) -> Iterator[str | int]:
        """Yield pieces of plain text and ids of special tokens, in order."""
        done = 0
        strip = False
        for at, token in self.find(text):
            if at < done:
                continue
            plain = text[done:at]
            plain = plain.lstrip(_WHITE_SPACE) if strip else plain
            plain = plain.rstrip(_WHITE_SPACE) if token.lstrip else plain
            if plain:
                yield plain
            yield token.id
            done, strip = at + len(token.content), token.rstrip
        rest = text[done:].lstrip(_WHITE_SPACE) if strip else text[done:]
        if rest:
            yield rest

    def open_ends(self, text: str) -> tuple[bool, bool]:
        """Whether something put before, or behind, `text` could make a special token together with it."""
        if self._edges is None:
            heads = frozenset(t[:k] for t in self._by_text for k in range(1, len(t)))
            tails = frozenset(t[k:] for t in self._by_text for k in range(1, len(t)))
            self._edges = heads, tails
        heads, tails = self._edges
        longest = self._lengths[0] - 1 if self._lengths else 0
        sizes = range(1, min(longest, len(text)) + 1)
        return any(text[:k] in tails for k in sizes), any(text[-k:] in heads for k in sizes)


class Guard:
    """Marks strings of one request. The mark is a private-use character that none of them holds."""

    def __init__(self, specials: SpecialTokens, strings: Iterable[str]) -> None:
        used = {char for text in strings for char in _PRIVATE.findall(text)}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self._specials = specials
        self._mark = next(free, "\U000f0000")

    def protect(self, text: str) -> str:
        """Return `text` with a mark inside of everything that is, or could become, a special token."""
        out: list[str] = []
        done = 0
        for at, _ in self._specials.find(text):
            out += text[done : at + 1], self._mark
            done = at + 1
        before, behind = self._specials.open_ends(text)
        return f"{self._mark * before}{''.join(out)}{text[done:]}{self._mark * behind}"

    def protect_all(self, value: Any) -> Any:
        """Return plain data with every string in it, keys too, protected."""
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, dict):
            return {self.protect_all(key): self.protect_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect_all(item) for item in value]
        return value

    def split(self, rendered: str) -> Iterator[str | int]:
        """Yield the rendered text's pieces without marks, and the ids of the template's special tokens."""
        for piece in self._specials.split(rendered):
            if isinstance(piece, int):
                yield piece
            elif plain := piece.replace(self._mark, ""):
                yield plain
