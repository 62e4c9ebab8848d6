"""The Ollama API under /api."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec

from sagellm_gateway.context import Call
from sagellm_gateway.dialects import ollama
from sagellm_gateway.dialects.openai_common import check_model, encode_json
from sagellm_gateway.errors import ollama_body
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import convert
from sagellm_gateway.library import LibraryModel
from sagellm_gateway.routes.generation import extras, generate
from sagellm_gateway.routes.models import model_entries
from sagellm_gateway.streaming import guarded, stream
from sagellm_gateway.version import version as isagellm_version
from sagellm_protocol.errors import InvalidArgumentError, ModelNotFoundError, SageError, UnsupportedError

__all__ = ["chat", "copy", "delete", "generate_", "ps", "pull", "served", "show", "tags", "version"]


async def chat(call: Call) -> None:
    """POST /api/chat."""
    raw = await call.json_object()
    body = convert(raw, ollama.OllamaChatBody)
    call.ignore(ollama.ignored_options(raw, ollama.KNOWN_CHAT))
    body.model = await served(call, body.model)
    if not body.messages:
        await _load(call, body, chat=True)
        return
    request = ollama.chat_request(body, new_id("ollama-"), call.gateway.config.limits, **extras(call, body.model))
    await _run(call, request, raw["model"], stream_it=body.stream is not False, chat=True)


async def generate_(call: Call) -> None:
    """POST /api/generate."""
    raw = await call.json_object()
    body = convert(raw, ollama.OllamaGenerateBody)
    call.ignore(ollama.ignored_options(raw, ollama.KNOWN_GENERATE))
    body.model = await served(call, body.model)
    if not (body.prompt or body.suffix):
        await _load(call, body, chat=False)
        return
    request = ollama.generate_request(body, new_id("ollama-"), call.gateway.config.limits, **extras(call, body.model))
    await _run(call, request, raw["model"], stream_it=body.stream is not False, chat=False)


async def _run(call: Call, request: Any, shown: str, *, stream_it: bool, chat: bool) -> None:
    call.scope["sagellm.model"] = request.model
    events = generate(call, request)
    if stream_it:
        await stream(call, events, ollama.OllamaFrames(shown, chat=chat))
        return
    result = ollama.OllamaResult(shown, chat=chat)
    async with guarded(call, events) as source:
        async for event in source:
            result.add(event)
    await call.json(result.body())


async def _load(call: Call, body: ollama.OllamaCommon, *, chat: bool) -> None:
    if body.keep_alive in (0, "0", "0s"):
        raise UnsupportedError("keep_alive 0 (unload) is not supported here: stop the engine", param="keep_alive")
    call.gateway.manager.chat_model(body.model)
    await call.json(ollama.loaded(body.model, chat=chat, unload=False))


async def served(call: Call, name: str) -> str:
    """Return the served name: Ollama clients add ``:latest`` to what they were given."""
    check_model(name)
    ids = {entry["id"] for entry in await model_entries(call)}
    for candidate in (name, name.removesuffix(":latest"), f"{name}:latest"):
        if candidate in ids:
            return candidate
    raise ModelNotFoundError(f"model {name!r} not found: sage-llm pull {name}", param="model")


def _entry(model: LibraryModel) -> dict[str, Any]:
    when = datetime.datetime.fromtimestamp(model.modified_at, datetime.timezone.utc)
    family = str(model.details.get("family", ""))
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": when.isoformat().replace("+00:00", "Z"),
        "size": model.size,
        "digest": model.digest,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": family,
            "families": [family] if family else [],
            "parameter_size": "",
            "quantization_level": "",
            **model.details,
        },
    }


async def _models(call: Call, *, on_disk: bool) -> list[LibraryModel]:
    served = [entry["id"] for entry in await model_entries(call)]
    library = {m.name: m for m in call.gateway.library.models()}
    started = call.gateway.started_at
    shown = [library.get(name) or LibraryModel(name=name, modified_at=started) for name in served]
    return [*shown, *(m for name, m in library.items() if name not in served)] if on_disk else shown


async def tags(call: Call) -> None:
    """GET /api/tags: what is served, and what is on disk."""
    await call.json({"models": [_entry(m) for m in await _models(call, on_disk=True)]})


async def ps(call: Call) -> None:
    """GET /api/ps: what is served."""
    never = "9999-12-31T23:59:59Z"
    entries = [_entry(m) for m in await _models(call, on_disk=False)]
    await call.json({"models": [{**e, "expires_at": never, "size_vram": 0} for e in entries]})


async def version(call: Call) -> None:
    """GET /api/version."""
    await call.json({"version": isagellm_version()})


class NameBody(msgspec.Struct, kw_only=True):
    """A body that names a model; older clients call the field `name`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None

    def given(self) -> str:
        """Return the name.

        Raises:
            InvalidArgumentError: there is none.
        """
        name = self.model or self.name
        if not name:
            raise InvalidArgumentError("model is missing", param="model")
        return check_model(name)


async def show(call: Call) -> None:
    """POST /api/show."""
    name = await served(call, convert(await call.json_object(), NameBody).given())
    kind = next(entry["kind"] for entry in await model_entries(call) if entry["id"] == name)
    model = call.gateway.manager.chat_model(name)
    entry = next(_entry(m) for m in await _models(call, on_disk=False) if m.name == name)
    family = entry["details"]["family"] or "llama"
    await call.json(
        {
            "modelfile": f"FROM {name}",
            "parameters": "\n".join(f"{k} {v}" for k, v in getattr(model, "sampling_defaults", {}).items()),
            "template": getattr(model, "chat_template", None) or "",
            "details": entry["details"],
            "model_info": {"general.architecture": family, f"{family}.context_length": model.context_length},
            "capabilities": ["completion", "tools"] if kind == "llm" else ["embedding"],
            "modified_at": entry["modified_at"],
        }
    )


async def pull(call: Call) -> None:
    """POST /api/pull: JSON lines with the progress, or one object with ``stream: false``."""
    body = convert(await call.json_object(), NameBody)
    if body.insecure:
        raise UnsupportedError("insecure is not supported: sources are always verified", param="insecure")
    progress = call.gateway.library.pull(body.given())
    if body.stream is False:
        async for _ in progress:
            pass
        await call.json({"status": "success"})
        return
    call.started = True
    await call.send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]}
    )
    try:
        async for step in progress:
            line = {k: v for k, v in msgspec.to_builtins(step).items() if v}
            await call.send({"type": "http.response.body", "body": encode_json(line) + b"\n", "more_body": True})
    except SageError as error:
        line = ollama_body(error, call.request_id)
        await call.send({"type": "http.response.body", "body": encode_json(line) + b"\n", "more_body": True})
    await call.send({"type": "http.response.body", "body": b""})


async def delete(call: Call) -> None:
    """DELETE /api/delete."""
    await call.gateway.library.delete(convert(await call.json_object(), NameBody).given())
    await call.reply(b"")


class CopyBody(msgspec.Struct, kw_only=True):
    """The request body of copy."""

    source: str
    destination: str


async def copy(call: Call) -> None:
    """POST /api/copy."""
    body = convert(await call.json_object(), CopyBody)
    await call.gateway.library.copy(check_model(body.source), check_model(body.destination))
    await call.reply(b"")
