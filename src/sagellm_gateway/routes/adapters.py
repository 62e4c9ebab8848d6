"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them. For the role admin."""

from __future__ import annotations

import logging

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.dialects.openai_common import check_model
from sagellm_gateway.jsonbody import convert
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError

__all__ = ["LoadAdapterBody", "UnloadAdapterBody", "load_adapter", "unload_adapter"]


log = logging.getLogger("sagellm_gateway")


class LoadAdapterBody(msgspec.Struct, kw_only=True):
    """`lora_path` is a PEFT directory on the engines' machine; `model` is needed where several models are served."""

    lora_name: str
    lora_path: str
    model: str | None = None


class UnloadAdapterBody(msgspec.Struct, kw_only=True):
    """The adapter to forget."""

    lora_name: str


async def load_adapter(call: Call) -> None:
    """Load a LoRA adapter on all engines of a model; its name then answers like a model's."""
    body = convert(await call.json_object(), LoadAdapterBody)
    try:
        info = await call.gateway.manager.load_adapter(check_model(body.lora_name), body.lora_path, body.model)
    except ModelFileError as error:
        # The path came with the request, so it is the request that is wrong; what stands in the files stays in the log.
        log.warning("request %s: adapter not loaded: %s", call.request_id, error.message)
        raise InvalidArgumentError(
            "the adapter's files are missing or cannot be read: lora_path must be a PEFT directory on the engines' machine",
            param="lora_path",
        ) from None
    await call.json({"id": info.name, "object": "model", "parent": info.model})


async def unload_adapter(call: Call) -> None:
    """Forget a LoRA adapter; refused while requests use it."""
    body = convert(await call.json_object(), UnloadAdapterBody)
    await call.gateway.manager.unload_adapter(body.lora_name)
    await call.json({"id": body.lora_name, "object": "model", "deleted": True})
