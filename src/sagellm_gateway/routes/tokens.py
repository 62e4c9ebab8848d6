"""POST /tokenize, POST /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.dialects import openai_chat
from sagellm_gateway.dialects.openai_common import check_model
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.routes.models import model_entries
from sagellm_protocol.errors import InvalidArgumentError, ModelNotFoundError

__all__ = ["detokenize", "tokenize", "tokenizer_info"]


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Text, or messages to put through the chat template first."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[openai_chat.MessageWire] | None = None
    add_special_tokens: bool = True
    parse_special: bool = False
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Token ids."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool = False


async def _model(call: Call, name: str | None) -> Any:
    if name is None:
        entries = await model_entries(call)
        if len(entries) != 1:
            raise ModelNotFoundError(f"{len(entries)} models are served: name one in model", param="model")
        name = entries[0]["id"]
    return call.gateway.manager.chat_model(check_model(name))


async def tokenize(call: Call) -> None:
    """POST /tokenize: ``{tokens, count, max_model_len}``; special tokens in text stay text unless `parse_special`."""
    body = convert(await call.json_object(), TokenizeBody)
    model = await _model(call, body.model)
    text = body.prompt if body.prompt is not None else body.content
    if body.messages is not None and text is not None:
        raise InvalidArgumentError("prompt and messages exclude each other: send one", param="prompt")
    if body.messages is not None:
        chat = openai_chat.ChatBody(model=model.model_id, messages=body.messages)
        request = openai_chat.request_of(chat, new_id("tok-"), call.gateway.config.limits)
        tokens = list((await asyncio.to_thread(model.prepare, request)).engine_requests[0].prompt_token_ids)
    elif text is not None:
        tokens = await asyncio.to_thread(
            model.tokenize, text, add_special_tokens=body.add_special_tokens, parse_special=body.parse_special
        )
    else:
        raise InvalidArgumentError("prompt is missing: send prompt or messages", param="prompt")
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": model.context_length}
    if body.return_token_strs:
        answer["token_strs"] = [model.detokenize([t]) for t in tokens]
    await call.json(answer)


async def detokenize(call: Call) -> None:
    """POST /detokenize: ``{prompt}``."""
    body = convert(await call.json_object(), DetokenizeBody)
    model = await _model(call, body.model)
    if any(not 0 <= t < 2**31 for t in body.tokens):
        raise InvalidArgumentError("tokens holds an id that no vocabulary has", param="tokens")
    text = model.detokenize(body.tokens, skip_special_tokens=body.skip_special_tokens)
    await call.json({"prompt": text, "content": text})


async def tokenizer_info(call: Call) -> None:
    """GET /tokenizer_info."""
    model = await _model(call, call.query().get("model"))
    await call.json(
        {
            "model": model.model_id,
            "max_model_len": model.context_length,
            "vocab_size": getattr(model, "vocab_size", None),
            "eos_token_ids": list(getattr(model, "eos_token_ids", ()) or ()),
        }
    )
