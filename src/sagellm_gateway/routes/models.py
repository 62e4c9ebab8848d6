"""/v1/models: what is served."""

from __future__ import annotations

import inspect
from typing import Any

from sagellm_gateway.context import Call
from sagellm_protocol.errors import ModelNotFoundError

__all__ = ["get_model", "list_models", "model_entries"]


async def model_entries(call: Call) -> list[dict[str, Any]]:
    """Return the OpenAI `model` objects of what the control plane serves."""
    found = call.gateway.manager.list_models()
    if inspect.isawaitable(found):
        found = await found
    created = int(call.gateway.started_at)
    return [
        {"id": str(getattr(m, "id", m)), "object": "model", "created": created, "owned_by": "isagellm"} for m in found
    ]


async def list_models(call: Call) -> None:
    """GET /v1/models."""
    await call.json({"object": "list", "data": await model_entries(call)})


async def get_model(call: Call) -> None:
    """GET /v1/models/{id}."""
    name = call.path("model")
    for entry in await model_entries(call):
        if entry["id"] == name:
            await call.json(entry)
            return
    raise ModelNotFoundError(f"the model {name[:128]!r} is not served here", param="model")
