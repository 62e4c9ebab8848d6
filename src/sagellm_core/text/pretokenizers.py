"""Pre-tokenizers of byte-level BPE vocabularies, by the name in `tokenizer.ggml.pre`.

A wrong one still tokenises, only differently from what the model was trained on; so an unknown name is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from sagellm_protocol.errors import ModelFileError

__all__ = ["PreTokenizer", "pre_tokenizer"]

_LETTERS_LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_ENGLISH}|{_LETTERS_LLAMA3}|\\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = f"{_ENGLISH}|{_LETTERS_LLAMA3}|\\p{{N}}|{_REST}"
_QWEN35 = (
    f"{_ENGLISH}|[^\\r\\n\\p{{L}}\\p{{N}}]?[\\p{{L}}\\p{{M}}]+|\\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = _CASED % ((_ENGLISH + "?",) * 2) + f"|\\p{{N}}{{1,3}}|{_SLASHED}"
_TEKKEN = _CASED % ("", "") + f"|\\p{{N}}|{_SLASHED}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before BPE.

    Attributes:
        pattern: pieces of the text; empty is GPT-2's own pattern.
        digits: each digit is cut out first.
        ignore_merges: a piece that is in the vocabulary is one token, whatever the merges say.
        nfc: text is normalised to NFC first.
    """

    pattern: str = ""
    digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA_BPE = PreTokenizer(_LLAMA3, ignore_merges=True)
_KNOWN = {
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT2,
    "jina-v2-en": _GPT2,
    "roberta-bpe": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": PreTokenizer(digits=True, nfc=True),
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "dbrx": PreTokenizer(_LLAMA3),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "qwen2": PreTokenizer(_QWEN2, nfc=True),
    "qwen35": PreTokenizer(_QWEN35),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2),
    "gpt-4o": PreTokenizer(_GPT4O),
    "llama4": PreTokenizer(_GPT4O),
    "tekken": PreTokenizer(_TEKKEN, ignore_merges=True),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the pre-tokenizer of that name.

    Raises:
        ModelFileError: unknown; the message lists the known ones.
    """
    known = _KNOWN.get(name)
    if known is None:
        raise ModelFileError(
            f"pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported: {', '.join(sorted(_KNOWN))} are; "
            "a model directory with tokenizer.json works with any"
        )
    return known
