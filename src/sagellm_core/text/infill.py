"""Filling in the middle: a model is shown what stands before and after a gap, and writes what belongs there.

How models learn it: Bavarian et al., Efficient Training of Language Models to Fill in the Middle, 2022. Each family spells the
control tokens its own way; all but one put the gap last: before, after, middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sagellm_core.text.tokenizer import TextTokenizer
from sagellm_protocol.errors import UnsupportedError

__all__ = ["infill_ends", "infill_prompt"]


class _Names(NamedTuple):
    before: str
    after: str
    middle: str | None


_FAMILIES = (
    _Names("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, Granite 4
    _Names("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    _Names("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    _Names("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    _Names("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    _Names("<PRE>", "<SUF>", "<MID>"),
    _Names("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    _Names("[PREFIX]", "[SUFFIX]", None),  # Codestral: what stands after comes first, and no token says where to begin
)

_ENDS = (
    "<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<PAD>", "<|repo_name|>", "<reponame>", "<|file_sep|>", "<file_sep>",
    "<|file_separator|>",
)  # fmt: skip


def infill_prompt(tokenizer: TextTokenizer, model_id: str, before: str | Sequence[int], after: str) -> list[int]:
    """Return the ids of a prompt that asks for what stands between `before` and `after`.

    Both are text: control tokens spelled in them stay text.

    Args:
        tokenizer: of the model.
        model_id: for the message.
        before: text or token ids.
        after: text.

    Raises:
        UnsupportedError: the model has no tokens for it.
    """
    tokens = _tokens(tokenizer)
    if tokens is None:
        raise UnsupportedError(
            f"suffix is not supported by {model_id}: its vocabulary has no tokens for filling in the middle; "
            "use a model that was trained for it, or leave suffix out",
            param="suffix",
        )
    first = tokenizer.encode_pieces([before]) if isinstance(before, str) else list(before)
    # As a piece that is not the first: `after` goes on in mid-line, no space belongs before it.
    last = tokenizer.encode_pieces([0, after])[1:]
    head, tail, middle = tokens
    prefix = list(tokenizer.info.prefix_ids)
    if middle is None:
        return [*prefix, tail, *last, head, *first]
    return [*prefix, head, *first, tail, *last, middle]


def infill_ends(tokenizer: TextTokenizer) -> set[int]:
    """Return the tokens by which a model says that the gap is filled, besides those that end any answer."""
    return {found for name in _ENDS if (found := tokenizer.id_of(name)) is not None}


def _tokens(tokenizer: TextTokenizer) -> tuple[int, int, int | None] | None:
    """Ids of before, after and middle: those that the file names, else by the names of the families."""
    if tokenizer.info.infill_ids:
        return tokenizer.info.infill_ids
    for names in _FAMILIES:
        before, after = tokenizer.id_of(names.before), tokenizer.id_of(names.after)
        middle = tokenizer.id_of(names.middle) if names.middle is not None else None
        if before is not None and after is not None and (middle is not None or names.middle is None):
            return before, after, middle
    return None
