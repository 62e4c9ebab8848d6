"""Probes: /live, /health, /ready, /version."""

from __future__ import annotations

from sagellm_gateway.context import Call
from sagellm_gateway.routes.models import model_entries
from sagellm_gateway.version import version as isagellm_version

__all__ = ["health", "live", "ready", "version"]


async def live(call: Call) -> None:
    """GET /live: the process answers."""
    await call.json({"status": "ok"})


async def health(call: Call) -> None:
    """GET /health: the old name of /live, with what is served."""
    models = [entry["id"] for entry in await model_entries(call)]
    await call.json({"status": "ok", "ready": _state(call, bool(models)) == "ready", "models": models})


async def ready(call: Call) -> None:
    """GET /ready: 200 when new work can be taken, 503 while loading or draining."""
    state = _state(call, bool(await model_entries(call)))
    await call.json({"status": state}, status=200 if state == "ready" else 503)


def _state(call: Call, any_model: bool) -> str:
    if call.gateway.draining:
        return "draining"
    return "ready" if call.gateway.ready and any_model else "loading"


async def version(call: Call) -> None:
    """GET /version."""
    await call.json({"version": isagellm_version()})
