"""Tokenizer of a GGUF file: the vocabulary in the metadata -> `TokenizerInfo` and a tokenizer.json for `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, Literal

import msgspec

from sagellm_core.loader.gguf import GGUFArray, GGUFHeader
from sagellm_core.text.pretokenizers import pre_tokenizer
from sagellm_core.text.specials import SpecialToken
from sagellm_core.text.tokenizer import TokenizerInfo
from sagellm_protocol.errors import ModelFileError

__all__ = ["ANSWER_ENDS", "convert_gguf"]

ANSWER_ENDS = (
    "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<|eot|>",
    "<|return|>", "<|call|>", "<EOT>", "<turn|>",
)  # fmt: skip
"""Control tokens that end an answer, whatever the metadata says; llama.cpp does the same."""


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def convert_gguf(header: GGUFHeader) -> tuple[TokenizerInfo, bytes]:
    """Return the vocabulary of a GGUF file and its tokenizer.json.

    Raises:
        ModelFileError: no vocabulary, an unknown kind, or contradictions in it.
    """
    model = _text(header, "tokenizer.ggml.model")
    tokens = _strings(header, "tokenizer.ggml.tokens")
    types = _types(header, len(tokens))
    if model == "gpt2":
        kind: Literal["byte_level", "metaspace"] = "byte_level"
        document = _byte_level(header, tokens, types)
    elif model == "llama":
        kind = "metaspace"
        document = _metaspace(header, tokens, types)
    else:
        raise ModelFileError(f"tokenizer model {model!r} (tokenizer.ggml.model) is not supported: gpt2 and llama are")
    return _info(header, kind, tokens, types), msgspec.json.encode(document)


def _info(
    header: GGUFHeader, kind: Literal["byte_level", "metaspace"], tokens: list[str], types: Sequence[int]
) -> TokenizerInfo:
    meta = header.metadata
    names = {key: _token_id(header, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "unknown")}
    texts = {key: "" if index is None else tokens[index] for key, index in names.items()}
    outer = {index for index in (names["bos"], names["eos"]) if index is not None}
    specials = tuple(
        SpecialToken(i, tokens[i])
        for i, kind_of in enumerate(types)
        if (kind_of in (TokenType.CONTROL, TokenType.UNKNOWN) or i in outer) and len(tokens[i]) > 1
    )
    by_text = {token.content: token.id for token in specials}
    ends = {by_text[text] for text in ANSWER_ENDS if text in by_text}
    ends |= {
        i for key in ("eos", "eot", "eom") if (i := _token_id(header, f"tokenizer.ggml.{key}_token_id")) is not None
    }
    bos, eos = names["bos"], names["eos"]
    add_bos = bool(meta.get("tokenizer.ggml.add_bos_token", kind == "metaspace"))
    add_eos = bool(meta.get("tokenizer.ggml.add_eos_token", False))
    template = meta.get("tokenizer.chat_template")
    tools = meta.get("tokenizer.chat_template.tool_use")
    return TokenizerInfo(
        kind=kind,
        vocab_size=len(tokens),
        longest_token=max(map(len, tokens), default=1) or 1,
        specials=specials,
        literals=tuple(i for i, kind_of in enumerate(types) if kind_of == TokenType.USER_DEFINED),
        prefix_ids=(bos,) if add_bos and bos is not None else (),
        suffix_ids=(eos,) if add_eos and eos is not None else (),
        eos_token_ids=tuple(sorted(ends)),
        space_prefix="always" if kind == "metaspace" and meta.get("tokenizer.ggml.add_space_prefix", True) else "no",
        bos_token=texts["bos"],
        eos_token=texts["eos"],
        pad_token=texts["padding"],
        unk_token=texts["unknown"],
        chat_template=template if isinstance(template, str) else None,
        tool_template=tools if isinstance(tools, str) else None,
        infill_ids=_infill_ids(header),
        family=str(meta.get("general.architecture", "")),
    )


def _infill_ids(header: GGUFHeader) -> tuple[int, int, int] | None:
    """Tokens before, after and at a gap to fill; older converters have longer names for them."""
    for names in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
        before, after, middle = (_token_id(header, f"tokenizer.ggml.{name}_token_id") for name in names)
        if before is not None and after is not None and middle is not None:
            return before, after, middle
    return None


def _byte_level(header: GGUFHeader, tokens: list[str], types: Sequence[int]) -> dict[str, Any]:
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    # Files without a name, or with "default", come from converters that knew GPT-2's pattern only.
    pre = pre_tokenizer("gpt-2" if name == "default" else str(name))
    # User-defined tokens stay in the vocabulary: `tokenizers` numbers added tokens anew that are not.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.CONTROL}
    merges = []
    for merge in _strings(header, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFileError(
                f"tokenizer.ggml.merges has {merge!r}, which is not made of tokens: the file is malformed"
            )
        merges.append((left, right))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not pre.pattern}
    steps: list[dict[str, Any]] = []
    if pre.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if pre.pattern:
        split = {"type": "Split", "pattern": {"Regex": pre.pattern}, "behavior": "Isolated", "invert": False}
        steps.append(split)
    return {
        "version": "1.0",
        "added_tokens": _added(tokens, types),
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "model": _bpe(vocab, merges, ignore_merges=pre.ignore_merges),
    }


def _metaspace(header: GGUFHeader, tokens: list[str], types: Sequence[int]) -> dict[str, Any]:
    scores = _numbers(header, "tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ModelFileError(f"the vocabulary has {len(tokens)} tokens and {len(scores)} scores: the file is malformed")
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.CONTROL}
    merges = [pair for _, pair in sorted(_merges(vocab, types, scores), key=lambda entry: entry[0])]
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    return {
        "version": "1.0",
        "added_tokens": _added(tokens, types),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "model": _bpe(vocab, merges, unk_token=unknown, byte_fallback=True),
    }


def _merges(
    vocab: Mapping[str, int], types: Sequence[int], scores: Sequence[float]
) -> Iterator[tuple[tuple[float, int, int], tuple[str, str]]]:
    """Every way to put a token together from two, to be tried by falling score of the result, as SentencePiece does."""
    usable = (TokenType.NORMAL, TokenType.USER_DEFINED)
    for token, index in vocab.items():
        if types[index] not in usable or " " in token:  # spaces are ▁ by then
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is None or right is None or types[left] not in usable or types[right] not in usable:
                continue
            yield (-scores[index], left, right), (token[:cut], token[cut:])


def _bpe(vocab: Mapping[str, int], merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": True, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    # "a b" is read a fifth faster than ["a", "b"], but only where no token holds a space.
    plain = not any(" " in left or " " in right for left, right in merges)
    joined = [f"{left} {right}" for left, right in merges] if plain else merges
    return defaults | options | {"vocab": vocab, "merges": joined}


def _added(tokens: list[str], types: Sequence[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return [
        {"id": i, "content": tokens[i], **flags}
        for i, kind in enumerate(types)
        if kind == TokenType.USER_DEFINED and tokens[i]
    ]


def _text(header: GGUFHeader, key: str) -> str:
    value = header.metadata.get(key)
    if not isinstance(value, str):
        raise ModelFileError(f"{header.path.name} has no {key}: it holds no tokenizer; pass a model directory instead")
    return value


def _strings(header: GGUFHeader, key: str) -> list[str]:
    value = header.metadata.get(key)
    if not isinstance(value, GGUFArray):
        raise ModelFileError(f"{header.path.name} has no {key}: its tokenizer is incomplete; fetch or convert it again")
    return value.strings()


def _numbers(header: GGUFHeader, key: str) -> list[int | float]:
    value = header.metadata.get(key)
    if not isinstance(value, GGUFArray):
        raise ModelFileError(f"{header.path.name} has no {key}: its tokenizer is incomplete; fetch or convert it again")
    return value.numbers()


def _types(header: GGUFHeader, count: int) -> Sequence[int]:
    if "tokenizer.ggml.token_type" not in header.metadata:
        return [TokenType.NORMAL] * count
    numbers = _numbers(header, "tokenizer.ggml.token_type")
    types = [value for value in numbers if isinstance(value, int)]
    if len(types) != count:
        raise ModelFileError(f"the vocabulary has {count} tokens and {len(types)} token types: the file is malformed")
    return types


def _token_id(header: GGUFHeader, key: str) -> int | None:
    value = header.metadata.get(key)
    if value is None:
        return None
    tokens = header.metadata["tokenizer.ggml.tokens"]
    count = len(tokens) if isinstance(tokens, GGUFArray) else 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ModelFileError(f"{key} is {value!r}, outside of the vocabulary of {count}: the file is malformed")
    return value
