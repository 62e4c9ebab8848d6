"""Texts for models that give vectors: single texts to embed, pairs of query and document to score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sagellm_core.text.tokenizer import TextTokenizer
from sagellm_protocol.embedding import EmbeddingRequest, EmbedRequest, ScoreRequest
from sagellm_protocol.errors import ContextLengthError, InvalidArgumentError, ModelFileError, UnsupportedError
from sagellm_protocol.generation import ChatMessage

__all__ = ["ENCODER_FAMILIES", "encoder_limit", "prepare_embedding", "prepare_score"]

ENCODER_FAMILIES = ("bert", "roberta", "xlm-roberta")

_DOUBLE_SEPARATOR = ("roberta", "xlm-roberta")

_JUDGE = (
    "You judge whether a document answers a query in the sense of an instruction. "
    'Reply with one word: "yes" if it does, "no" if it does not.'
)
_INSTRUCTION = "Find passages of the web that answer the query"


class _Renderer(Protocol):
    """Chat messages -> token ids."""

    def __call__(self, messages: tuple[ChatMessage, ...], /) -> list[int]: ...


def encoder_limit(directory: Path, config: dict[str, Any]) -> int | None:
    """Most tokens of an input of the encoder in `directory`; None if `config` (its config.json) is no encoder's.

    Raises:
        ModelFileError: a number is missing or malformed.
    """
    kind = config.get("model_type")
    if kind not in ENCODER_FAMILIES:
        return None
    offset = 0 if kind == "bert" else _whole(config.get("pad_token_id", 1), "pad_token_id") + 1
    longest = _whole(config.get("max_position_embeddings"), "max_position_embeddings") - offset
    sentence = directory / "sentence_bert_config.json"
    if sentence.is_file():
        try:
            wanted = msgspec.json.decode(sentence.read_bytes(), type=dict[str, Any]).get("max_seq_length")
        except msgspec.DecodeError as error:
            raise ModelFileError(f"{sentence.name} is malformed ({error}): fetch the model again") from None
        longest = min(longest, _whole(wanted, "max_seq_length")) if wanted else longest
    return longest


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelFileError(f"{name} is {value!r}, not a whole number: the model file is malformed")
    return value


def prepare_embedding(request: EmbeddingRequest, tokenizer: TextTokenizer, context_length: int) -> EmbedRequest:
    """Tokenise and check; token ids are taken as they are.

    Raises:
        InvalidArgumentError: no input, an empty one, a token id out of the vocabulary.
        ContextLengthError: an input does not fit and `truncate` is off; the message has both numbers.
    """
    if not request.inputs:
        raise InvalidArgumentError("input is empty: pass at least one text", param="input")
    inputs = [_ids(text, index, tokenizer) for index, text in enumerate(request.inputs)]
    suffix = len(tokenizer.info.suffix_ids)
    fitting = [
        _fit(ids, suffix if isinstance(text, str) else 0, context_length, request.truncate, f"input[{index}]")
        for index, (text, ids) in enumerate(zip(request.inputs, inputs, strict=True))
    ]
    return EmbedRequest(
        request_id=request.request_id,
        inputs=tuple(fitting),
        pooling=request.pooling,
        dimensions=request.dimensions,
        normalize=request.normalize,
        texts=tuple(text for text in request.inputs if isinstance(text, str)) if _all_text(request.inputs) else (),
        trace_id=request.trace_id,
        priority=request.priority,
        deadline_s=request.deadline_s,
        adapter=request.adapter,
    )


def prepare_score(
    request: ScoreRequest, tokenizer: TextTokenizer, context_length: int, render: _Renderer
) -> EmbedRequest:
    """Pair the query with each document: two segments for an encoder, a question of yes or no for a chat model.

    Raises:
        InvalidArgumentError: the query or a document is empty, or there is none.
        ContextLengthError: a pair does not fit and `truncate` is off.
        UnsupportedError: the chat model has no template, or no tokens for yes and no.
    """
    if not request.query.strip():
        raise InvalidArgumentError("query is empty: pass a text", param="query")
    if not request.documents:
        raise InvalidArgumentError("documents is empty: pass at least one", param="documents")
    for index, document in enumerate(request.documents):
        if not document.strip():
            raise InvalidArgumentError(f"documents[{index}] is empty: pass a text", param="documents")
    if tokenizer.info.family in ENCODER_FAMILIES:
        return _pairs(request, tokenizer, context_length)
    return _questions(request, tokenizer, context_length, render)


def _all_text(inputs: Sequence[str | tuple[int, ...]]) -> bool:
    return all(isinstance(text, str) for text in inputs)


def _ids(text: str | tuple[int, ...], index: int, tokenizer: TextTokenizer) -> list[int]:
    if not text:
        raise InvalidArgumentError(f"input[{index}] is empty: pass a text", param="input")
    if isinstance(text, str):
        ids = tokenizer.encode(text)
        if not ids:
            raise InvalidArgumentError(f"input[{index}] has no token: pass another text", param="input")
        return ids
    wrong = next((token for token in text if not 0 <= token < tokenizer.vocab_size), None)
    if wrong is not None:
        raise InvalidArgumentError(
            f"token id {wrong} is outside of the vocabulary of {tokenizer.vocab_size}", param="input"
        )
    return list(text)


def _fit(ids: list[int], tail: int, limit: int, truncate: bool, name: str) -> tuple[int, ...]:
    """`ids` within `limit`: what is before the last `tail` tokens is cut, if that is allowed."""
    if len(ids) <= limit:
        return tuple(ids)
    if not truncate:
        raise ContextLengthError(
            f"{name} has {len(ids)} tokens, the model takes {limit}: shorten it, or ask for truncation",
            param=name.partition("[")[0],
        )
    return tuple(ids[: limit - tail] + ids[len(ids) - tail :])


def _pairs(request: ScoreRequest, tokenizer: TextTokenizer, limit: int) -> EmbedRequest:
    """Prefix, query, separator, document, separator, as the encoder families were trained."""
    prefix, suffix = list(tokenizer.info.prefix_ids), list(tokenizer.info.suffix_ids)
    between = suffix * (2 if tokenizer.info.family in _DOUBLE_SEPARATOR else 1)
    head = prefix + tokenizer.encode(request.query, add_special_tokens=False) + between
    inputs, types = [], []
    for index, document in enumerate(request.documents):
        ids = head + tokenizer.encode(document, add_special_tokens=False) + suffix
        if len(head) + len(suffix) >= limit:
            raise ContextLengthError(
                f"the query has {len(head)} tokens, the model takes {limit} with the document: shorten it",
                param="query",
            )
        fitting = _fit(ids, len(suffix), limit, request.truncate, f"documents[{index}]")
        inputs.append(fitting)
        second = 0 if tokenizer.info.family in _DOUBLE_SEPARATOR else 1
        types.append((0,) * len(head) + (second,) * (len(fitting) - len(head)))
    return _scoring(request, tuple(inputs), "classify", token_types=tuple(types))


def _questions(request: ScoreRequest, tokenizer: TextTokenizer, limit: int, render: _Renderer) -> EmbedRequest:
    """A chat turn that asks for yes or no; the tokens of both are looked up in the next token's distribution."""
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[:1] for word in ("yes", "no"))
    if not yes or not no or yes == no:
        raise UnsupportedError("the model's vocabulary has no tokens of its own for yes and no", param="model")
    inputs = []
    for index, document in enumerate(request.documents):
        ids = _question(request, document, render)
        if len(ids) > limit and request.truncate:
            ids = _question(request, _cut(document, tokenizer, len(ids) - limit), render)
        inputs.append(_fit(ids, 0, limit, False, f"documents[{index}]"))
    return _scoring(request, tuple(inputs), "logprobs", target_ids=(*yes, *no))


def _question(request: ScoreRequest, document: str, render: _Renderer) -> list[int]:
    text = (
        f"Instruction: {request.instruction or _INSTRUCTION}\n\nQuery: {request.query}\n\nDocument: {document}\n\n"
        "Does the document answer the query? Reply yes or no."
    )
    return render((ChatMessage(role="system", content=_JUDGE), ChatMessage(role="user", content=text)))


def _cut(document: str, tokenizer: TextTokenizer, excess: int) -> str:
    """`document` without its last tokens; a few more than `excess`, because a cut text may be tokenised otherwise."""
    ids = tokenizer.encode(document, add_special_tokens=False)
    kept = ids[: max(0, len(ids) - excess - 4)]
    return tokenizer.decode(kept).rstrip("\ufffd")


def _scoring(request: ScoreRequest, inputs: tuple[tuple[int, ...], ...], task: Any, **fields: Any) -> EmbedRequest:
    return EmbedRequest(
        request_id=request.request_id,
        inputs=inputs,
        task=task,
        texts=tuple(request.documents),
        trace_id=request.trace_id,
        priority=request.priority,
        deadline_s=request.deadline_s,
        adapter=request.adapter,
        **fields,
    )
