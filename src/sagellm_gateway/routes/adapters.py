"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them. For the role admin."""

from __future__ import annotations

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.jsonbody import convert

__all__ = ["LoadAdapterBody", "UnloadAdapterBody", "load_adapter", "unload_adapter"]


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
    info = await call.gateway.manager.load_adapter(body.lora_name, body.lora_path, body.model)
    await call.json({"id": info.name, "object": "model", "parent": info.model})


async def unload_adapter(call: Call) -> None:
    """Forget a LoRA adapter; refused while requests use it."""
    body = convert(await call.json_object(), UnloadAdapterBody)
    await call.gateway.manager.unload_adapter(body.lora_name)
    await call.json({"id": body.lora_name, "object": "model", "deleted": True})
