"""/v1/management: engines, policy, models, keys. For the role admin."""

from __future__ import annotations

from typing import Any

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.dialects.openai_common import check_model
from sagellm_gateway.errors import HttpError
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.store.keys import ApiKey
from sagellm_protocol.errors import InvalidArgumentError, ModelNotFoundError

__all__ = [
    "add_key",
    "backends",
    "devices",
    "drain_engine",
    "engine",
    "engine_logs",
    "engines",
    "get_policy",
    "heartbeat",
    "keys",
    "load_model",
    "prune",
    "register",
    "revoke_key",
    "set_policy",
    "start_engine",
    "status",
    "stop_engine",
    "unload_model",
    "usage",
]


def _engine_id(call: Call) -> str:
    """Return the engine id of the path if such an engine is registered."""
    engine_id = call.path("engine")
    try:
        call.gateway.manager.get_engine_info(engine_id)
    except InvalidArgumentError as error:
        raise HttpError(404, error.message, code="engine_not_found") from None
    return engine_id


async def engines(call: Call) -> None:
    """GET engines: all, or those of one ``state``."""
    wanted = call.query().get("state")
    found = [msgspec.to_builtins(info) for info in call.gateway.manager.list_engines()]
    shown = [e for e in found if wanted is None or e["state"] == wanted.upper()]
    await call.json({"engines": shown, "count": len(shown)})


async def engine(call: Call) -> None:
    """GET engines/{id}: the engine and its health."""
    manager, engine_id = call.gateway.manager, _engine_id(call)
    info = msgspec.to_builtins(manager.get_engine_info(engine_id))
    await call.json({**info, "health": manager.get_engine_health_status(engine_id)})


async def engine_logs(call: Call) -> None:
    """GET engines/{id}/logs: the last lines that an engine of ours wrote."""
    raw = call.query().get("lines", "200")
    if not raw.isdigit() or not 1 <= int(raw[:6]) <= 10_000:
        raise InvalidArgumentError("lines must be 1 to 10000", param="lines")
    await call.json({"lines": call.gateway.manager.engine_logs(_engine_id(call), int(raw))})


class RegisterBody(msgspec.Struct, kw_only=True):
    """The request body of engines/register: an engine that runs somewhere."""

    engine_id: str
    model_id: str
    host: str
    port: int
    engine_kind: str = "llm"
    metadata: dict[str, Any] = {}


async def register(call: Call) -> None:
    """POST engines/register."""
    body = convert(await call.json_object(), RegisterBody)
    check_model(body.model_id)
    told = [body.engine_id, body.model_id, body.host, body.port, body.engine_kind, body.metadata]
    info, *_ = await call.gateway.everywhere("register", told, lasting=f"engine {body.engine_id}")
    await call.json(info, status=201)


class StartBody(msgspec.Struct, kw_only=True):
    """The request body of engines: start one for a model of the catalogue."""

    model_id: str
    engine_id: str | None = None
    options: dict[str, Any] = {}


async def start_engine(call: Call) -> None:
    """POST engines: returns when the engine is ready."""
    body = convert(await call.json_object(), StartBody)
    info = await call.gateway.manager.request_engine_startup(check_model(body.model_id), body.engine_id, body.options)
    await call.json(msgspec.to_builtins(info), status=201)


async def drain_engine(call: Call) -> None:
    """POST engines/{id}/drain: it gets no new requests."""
    engine_id = _engine_id(call)
    await call.gateway.everywhere("drain", engine_id, lasting=f"drain {engine_id}")
    await call.json(msgspec.to_builtins(call.gateway.manager.get_engine_info(engine_id)))


async def heartbeat(call: Call) -> None:
    """POST engines/{id}/heartbeat: the engine lives; renews the lease of one that was registered with ``lease_s``."""
    info, *_ = await call.gateway.everywhere("heartbeat", _engine_id(call))
    await call.json(info)


async def stop_engine(call: Call) -> None:
    """DELETE engines/{id}: drain, stop and forget; requests that run go on elsewhere."""
    manager, engine_id = call.gateway.manager, _engine_id(call)
    if manager.get_engine_info(engine_id).managed:
        info = msgspec.to_builtins(await manager.request_engine_shutdown(engine_id))
    else:
        info, *_ = await call.gateway.everywhere("unregister", engine_id, lasting=f"engine {engine_id}")
    await call.json(info)


async def prune(call: Call) -> None:
    """POST engines/prune: forget engines that are stopped."""
    pruned = call.gateway.manager.prune_stopped_engines()
    await call.json({"pruned": pruned, "count": len(pruned)})


async def status(call: Call) -> None:
    """GET status: the control plane and its requests as the process that answers sees them, and all processes of the gateway."""
    gateway = call.gateway
    manager = gateway.manager
    await call.json(
        {
            **manager.get_status(),
            "cluster": manager.get_cluster_status(),
            "metrics": msgspec.to_builtins(manager.get_metrics()),
            "scheduling": msgspec.to_builtins(manager.get_scheduling_metrics()),
            "gateway": _together(await gateway.everywhere("state")),
        }
    )


def _together(processes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "in_flight": sum(p["in_flight"] for p in processes),
        "draining": any(p["draining"] for p in processes),
        "ready": all(p["ready"] for p in processes),
        "processes": processes,
    }


async def backends(call: Call) -> None:
    """GET backends: those of the registered engines."""
    await call.json({"backends": call.gateway.manager.get_registered_backends()})


async def devices(call: Call) -> None:
    """GET gpu: the engines and where they run, by model (the old name of the route stays)."""
    cluster = call.gateway.manager.get_cluster_status()
    await call.json({"backends": call.gateway.manager.get_registered_backends(), "models": cluster["models"]})


class PolicyBody(msgspec.Struct, kw_only=True):
    """The request body of policy; a field that is left out stays as it is."""

    scheduling_policy: str | None = None
    routing_strategy: str | None = None
    policy: str | None = None


async def get_policy(call: Call) -> None:
    """GET policy."""
    found = call.gateway.manager.get_status()
    await call.json({name: found[name] for name in ("scheduling_policy", "routing_strategy")})


async def set_policy(call: Call) -> None:
    """PUT or POST policy: takes effect for the next request."""
    body = convert(await call.json_object(), PolicyBody)
    scheduling = body.scheduling_policy or body.policy
    if scheduling is None and body.routing_strategy is None:
        raise InvalidArgumentError("name scheduling_policy or routing_strategy", param="scheduling_policy")
    now = call.gateway.manager.get_status()
    wanted = [scheduling or now["scheduling_policy"], body.routing_strategy or now["routing_strategy"]]
    await call.gateway.everywhere("policy", wanted, lasting="policy")
    await get_policy(call)


class ModelBody(msgspec.Struct, kw_only=True):
    """The request body of models/load and models/unload."""

    model: str
    options: dict[str, Any] = {}


async def load_model(call: Call) -> None:
    """POST models/load: start an engine for the model unless one serves it."""
    body = convert(await call.json_object(), ModelBody)
    manager, model = call.gateway.manager, check_model(body.model)
    serving = [e for e in manager.get_engines_for_model(model) if e.is_healthy]
    if not serving:
        serving = [await manager.request_engine_startup(model, None, body.options)]
    await call.json({"model": model, "engines": [e.engine_id for e in serving]})


async def unload_model(call: Call) -> None:
    """POST models/unload: stop the engines that the server started for the model."""
    body = convert(await call.json_object(), ModelBody)
    manager, model = call.gateway.manager, check_model(body.model)
    managed = [e.engine_id for e in manager.get_engines_for_model(model) if e.managed]
    if not managed:
        raise ModelNotFoundError(f"no engine that this server started serves {model!r}: nothing to stop", param="model")
    for engine_id in managed:
        await manager.request_engine_shutdown(engine_id)
    await call.json({"model": body.model, "stopped": managed})


class KeyBody(msgspec.Struct, kw_only=True):
    """The request body of keys."""

    name: str
    role: str = "user"
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


def _key_json(key: ApiKey) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(key)
    del plain["hash"]
    return plain


async def keys(call: Call) -> None:
    """GET keys: all, without their secrets."""
    await call.json({"keys": [_key_json(key) for key in await call.gateway.keys.all_async()]})


async def add_key(call: Call) -> None:
    """POST keys: the answer holds the secret, this once."""
    body = convert(await call.json_object(), KeyBody)
    if body.role != "admin" and not call.gateway.keyring.demanded:
        raise InvalidArgumentError(
            "the first key must have the role admin: from then on these routes need one", param="role"
        )
    key, secret = await call.gateway.keys.add_async(
        body.name,
        body.role,  # type: ignore[arg-type]  # the store checks it
        requests_per_minute=body.requests_per_minute,
        tokens_per_minute=body.tokens_per_minute,
        tokens_per_day=body.tokens_per_day,
    )
    await call.gateway.keyring.refresh(force=True)
    await call.json({**_key_json(key), "key": secret}, status=201)


async def revoke_key(call: Call) -> None:
    """DELETE keys/{id}."""
    if not await call.gateway.keys.revoke_async(call.path("key")):
        raise HttpError(404, "no good key has that id or name", code="key_not_found")
    await call.gateway.keyring.refresh(force=True)
    await call.json({"revoked": call.path("key")})


async def usage(call: Call) -> None:
    """GET usage: tokens and requests by key, day and model."""
    await call.gateway.keyring.flush()
    rows = await call.gateway.keys.usage(call.query().get("key"))
    await call.json({"usage": [msgspec.to_builtins(row) for row in rows]})
