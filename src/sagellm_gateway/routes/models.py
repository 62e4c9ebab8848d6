"""/v1/models: what is served."""

from __future__ import annotations

import datetime
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
        {
            "id": str(getattr(m, "id", m)),
            "object": "model",
            "created": created,
            "owned_by": "isagellm",
            "kind": getattr(m, "kind", "llm"),
            "context_length": getattr(m, "context_length", None),
            **({"parent": m.parent} if getattr(m, "parent", "") else {}),
        }
        for m in found
    ]


def _anthropic(entry: dict[str, Any]) -> dict[str, Any]:
    when = datetime.datetime.fromtimestamp(entry["created"], datetime.timezone.utc)
    created = when.isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": entry["id"], "display_name": entry["id"], "created_at": created}


async def list_models(call: Call) -> None:
    """GET /v1/models; a client that sends ``anthropic-version`` gets Anthropic's shape."""
    entries = await model_entries(call)
    if call.header(b"anthropic-version") is None:
        await call.json({"object": "list", "data": entries})
        return
    ids = [entry["id"] for entry in entries]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    await call.json({"data": [_anthropic(e) for e in entries], "has_more": False, "first_id": first, "last_id": last})


async def get_model(call: Call) -> None:
    """GET /v1/models/{id}."""
    name = call.path("model")
    for entry in await model_entries(call):
        if entry["id"] != name:
            continue
        if call.header(b"anthropic-version") is not None:
            await call.json(_anthropic(entry))
            return
        model = call.gateway.manager.chat_model(name)
        await call.json({**entry, "sampling_defaults": dict(getattr(model, "sampling_defaults", {}))})
        return
    raise ModelNotFoundError(f"the model {name[:128]!r} is not served here", param="model")
