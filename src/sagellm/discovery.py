"""Where to connect when nobody said it: environment, then the local ports, each asked what it serves. No cloud fallback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sagellm_protocol.errors import UnauthenticatedError, UnavailableError

__all__ = ["CHAT_PORTS", "EMBEDDING_PORTS", "Endpoint", "Kind", "find_endpoint", "model_kind"]

Kind = Literal["chat", "embedding"]

CHAT_PORTS = (8889, 8001, 8901, 8002)
EMBEDDING_PORTS = (8090, 8091)

_VARIABLES: dict[Kind, tuple[str, ...]] = {
    "chat": ("SAGE_UNIFIED", "SAGE_CHAT"),
    "embedding": ("SAGE_UNIFIED", "SAGE_EMBEDDING"),
}
_PROBE_SECONDS = 1.0
_LOCKED = "wants an API key"


@dataclass(frozen=True)
class Endpoint:
    """A server.

    Attributes:
        base_url: ends in ``/v1``.
        model: what to ask it for; None where it was not said.
        api_key: None where none is needed.
    """

    base_url: str
    model: str | None
    api_key: str | None


async def find_endpoint(kind: Kind, *, api_key: str | None = None) -> Endpoint:
    """Return the server to use for `kind`.

    Order: ``SAGE_UNIFIED_BASE_URL`` (``_MODEL``, ``_API_KEY``), then ``SAGE_CHAT_*`` or ``SAGE_EMBEDDING_*``, then the local ports.

    Raises:
        UnavailableError: nothing serves `kind`; the message lists what was tried and what answered there.
        UnauthenticatedError: what might serve it wants a key.
    """
    tried: list[str] = []
    for prefix in _VARIABLES[kind]:
        if url := os.environ.get(f"{prefix}_BASE_URL"):
            model = os.environ.get(f"{prefix}_MODEL") or None
            return Endpoint(url.rstrip("/"), model, api_key or os.environ.get(f"{prefix}_API_KEY") or None)
        tried.append(f"{prefix}_BASE_URL is not set")
    ports = CHAT_PORTS if kind == "chat" else (*EMBEDDING_PORTS, *CHAT_PORTS)
    for port in ports:
        base_url = f"http://127.0.0.1:{port}/v1"
        found = await _probe(base_url, kind, api_key)
        if isinstance(found, Endpoint):
            return found
        tried.append(f"{base_url}: {found}")
    locked = next((line.partition(": ")[0] for line in tried if line.endswith(_LOCKED)), None)
    if locked is not None:
        raise UnauthenticatedError(
            f"no open {kind} server found ({'; '.join(tried)}): pass api_key, or set SAGE_UNIFIED_BASE_URL={locked} and SAGE_UNIFIED_API_KEY"
        )
    raise UnavailableError(
        f"no {kind} server found ({'; '.join(tried)}): start one with `sage-llm serve`, pass base_url, or use embedded=True"
    )


def model_kind(row: Mapping[str, Any]) -> Kind:
    """Return what a row of ``/v1/models`` serves: by its ``kind`` where the server says it, else by its name."""
    declared = str(row.get("kind") or row.get("type") or row.get("task") or "").lower()
    if declared:
        return "embedding" if "embed" in declared else "chat"
    name = str(row.get("id", "")).lower()
    hints = ("embed", "minilm", "bge-", "/bge", "e5-", "gte-", "sentence-t")
    return "embedding" if any(hint in name for hint in hints) else "chat"


async def _probe(base_url: str, kind: Kind, api_key: str | None) -> Endpoint | str:
    """Return the endpoint if it serves `kind`, else one line that says what is there."""
    import httpx2

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx2.AsyncClient(timeout=_PROBE_SECONDS, trust_env=False) as http:
            response = await http.get(f"{base_url}/models", headers=headers)
        rows: list[dict[str, Any]] = response.json()["data"] if response.is_success else []
    except httpx2.TransportError:
        return "nothing listens"
    except (ValueError, KeyError, TypeError):
        return "not an OpenAI-compatible server"
    if response.status_code in {401, 403}:
        return _LOCKED
    if not response.is_success:
        return f"answers {response.status_code}"
    for row in rows:
        if model_kind(row) == kind:
            return Endpoint(base_url, str(row["id"]), api_key)
    return "serves " + (", ".join(str(row.get("id")) for row in rows) or "no model")
