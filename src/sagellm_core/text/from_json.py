"""Tokenizer of a model directory: tokenizer.json and its companions -> `TokenizerInfo` and a tokenizer.json without specials."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from sagellm_core.loader.safetensors import load_json
from sagellm_core.text.from_gguf import ANSWER_ENDS
from sagellm_core.text.specials import SpecialToken
from sagellm_core.text.tokenizer import TokenizerInfo
from sagellm_protocol.errors import ModelFileError

__all__ = ["convert_directory", "source_files"]

_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip

_MAX_ADDED = 1 << 20
_UNREACHABLE = -1e9  # score of a Unigram entry that is never chosen


def source_files(directory: Path) -> list[Path]:
    """Return the files that a tokenizer is made of, those that exist."""
    return [path for name in _NAMES if (path := directory / name).is_file()]


def convert_directory(directory: Path) -> tuple[TokenizerInfo, bytes]:
    """Return the vocabulary of a model directory and the tokenizer.json to load.

    Raises:
        ModelFileError: tokenizer.json is missing or malformed.
    """
    document = load_json(directory / "tokenizer.json")
    settings, generation, model = (
        load_json(path) if (path := directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    added = _added_tokens(document)
    specials = tuple(
        SpecialToken(t["id"], t["content"], bool(t.get("lstrip")), bool(t.get("rstrip")))
        for t in added
        if t.get("special")
    )
    by_text = {token.content: token.id for token in specials}
    vocab = _vocab(document)
    prefix, suffix = _around(document, by_text)
    bos = _token_text(settings, "bos_token")
    if not prefix and settings.get("add_bos_token") is True and bos in by_text:
        prefix = (by_text[bos],)
    literals = [t for t in added if not t.get("special")]
    document["added_tokens"] = literals
    _pin_ids(document["model"], literals)
    document["post_processor"] = None
    space_prefix: Literal["no", "missing"] = "missing" if _take_space_prefix(document) else "no"
    names: dict[str, Any] = {
        name: _token_text(settings, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    template, tool_template = _templates(directory, settings)
    info = TokenizerInfo(
        kind=_kind(document),
        vocab_size=1 + max([*vocab.values(), *(t["id"] for t in added)], default=-1),
        longest_token=max([1, *map(len, vocab), *(len(t["content"]) for t in added)]),
        specials=tuple(s for s in specials if len(s.content) > 1),
        literals=tuple(t["id"] for t in literals),
        prefix_ids=prefix,
        suffix_ids=suffix,
        eos_token_ids=_ends(by_text, names["eos_token"], generation, model),
        space_prefix=space_prefix,
        own_prefix=_encoder_prefix(document),
        chat_template=template,
        tool_template=tool_template,
        family=str(model.get("model_type", "")),
        **names,
    )
    return info, msgspec.json.encode(document)


def _added_tokens(document: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        added = msgspec.convert(document.get("added_tokens") or [], list[dict[str, Any]])
        for token in added:
            msgspec.convert(token, _Added)
    except msgspec.ValidationError as error:
        raise ModelFileError(f"tokenizer.json's added_tokens are malformed ({error}): fetch it again") from error
    return added


class _Added(msgspec.Struct):
    id: int
    content: str


def _vocab(document: dict[str, Any]) -> dict[str, int]:
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: pairs of token and score
        return {str(entry[0]): i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        raise ModelFileError("tokenizer.json has no model.vocab: fetch it again")
    return vocab


def _pin_ids(model: dict[str, Any], literals: list[dict[str, Any]]) -> None:
    """Put added tokens into the vocabulary too: `tokenizers` numbers them anew if it does not find them there."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        vocab.update({token["content"]: token["id"] for token in literals})
        return
    most = max((token["id"] for token in literals), default=-1)
    if most > len(vocab) + _MAX_ADDED:
        raise ModelFileError(f"tokenizer.json adds a token with the id {most} to {len(vocab)}: fetch it again")
    vocab.extend([f"\0{index}", _UNREACHABLE] for index in range(len(vocab), most + 1))
    for token in literals:
        vocab[token["id"]] = [token["content"], _UNREACHABLE]


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from _walk(child)


def _kind(document: dict[str, Any]) -> Literal["byte_level", "metaspace", "raw"]:
    steps = [*_walk(document.get("pre_tokenizer")), *_walk(document.get("decoder"))]
    types = {step.get("type") for step in steps}
    if "ByteLevel" in types:
        return "byte_level"
    if types & {"Metaspace", "ByteFallback", "Replace"}:
        return "metaspace"
    return "raw"


def _take_space_prefix(document: dict[str, Any]) -> bool:
    """Take over the prefix that is put before the first piece of a text only; `encode_pieces` knows which is first."""
    for step in _walk(document.get("pre_tokenizer")):
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
            return True
    return False


def _encoder_prefix(document: dict[str, Any]) -> bool:
    """Whether the encoder puts a space before every piece."""
    steps = [*_walk(document.get("normalizer")), *_walk(document.get("pre_tokenizer"))]
    return any(step.get("type") == "Prepend" or step.get("prepend_scheme") == "always" for step in steps)


def _around(document: dict[str, Any], specials: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the post-processor puts before and behind one text."""
    for step in _walk(document.get("post_processor")):
        if step.get("type") != "TemplateProcessing":
            continue
        table = step.get("special_tokens") or {}
        sides: tuple[list[int], list[int]] = ([], [])
        side = 0
        for part in step.get("single") or []:
            if "Sequence" in part:
                side = 1
            elif "SpecialToken" in part:
                name = part["SpecialToken"].get("id")
                entry = table.get(name) or {}
                sides[side].extend(entry.get("ids") or [specials[name]] if name in specials else entry.get("ids") or [])
        return tuple(sides[0]), tuple(sides[1])
    return (), ()


def _token_text(settings: dict[str, Any], name: str) -> str:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ends(specials: dict[str, int], eos: str, generation: dict[str, Any], model: dict[str, Any]) -> tuple[int, ...]:
    ends = {specials[text] for text in (eos, *ANSWER_ENDS) if text in specials}
    for source in (generation, model):
        value = source.get("eos_token_id")
        ends |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return tuple(sorted(ends))


def _templates(directory: Path, settings: dict[str, Any]) -> tuple[str | None, str | None]:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8"), None
    value = settings.get("chat_template")
    if value is None and (separate := directory / "chat_template.json").is_file():
        value = load_json(separate).get("chat_template")
    if isinstance(value, str):
        return value, None
    if isinstance(value, list):  # several templates by name
        named = {str(t.get("name")): str(t.get("template")) for t in value if isinstance(t, dict)}
        return named.get("default"), named.get("tool_use")
    return None, None
