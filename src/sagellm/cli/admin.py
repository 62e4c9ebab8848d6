"""Calls to a running server's management routes, for the commands that operate it."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from sagellm.transport import HttpTransport, RetryPolicy, Timeouts
from sagellm_protocol.errors import PermissionDeniedError, UnauthenticatedError, UnavailableError

__all__ = ["ApiKey", "Url", "base_url", "call", "key_for"]

Url = Annotated[
    str | None, typer.Option("--url", help="The server [SAGE_UNIFIED_BASE_URL, else http://127.0.0.1:8889/v1].")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Key of the role admin [SAGE_UNIFIED_API_KEY, else your own server's]."),
]

_LONGEST_S = 300.0


def call(
    method: str, path: str, body: dict[str, Any] | None = None, *, url: str | None, api_key: str | None
) -> dict[str, Any]:
    """Send one request to ``<url><path>`` and return the reply.

    Raises:
        SageError: what the server said, or that it is not there.
    """
    import asyncio

    base = base_url(url)
    key = key_for(base, api_key)

    async def send() -> dict[str, Any]:
        transport = HttpTransport(
            base, api_key=key, timeouts=Timeouts(total=_LONGEST_S), retries=RetryPolicy(attempts=1)
        )
        try:
            return await transport.request(method, path, body)
        finally:
            await transport.close()

    try:
        return asyncio.run(send())
    except UnavailableError as error:
        raise UnavailableError(f"{error} (--url names another server)") from error
    except (UnauthenticatedError, PermissionDeniedError) as error:
        raise type(error)(
            f"{error}. Pass --api-key KEY, or set SAGE_UNIFIED_API_KEY. `sage-llm keys add NAME --role admin` makes a key on the "
            "server's machine, with --state FILE if the server has one"
        ) from error


def base_url(url: str | None) -> str:
    """Return the server's address, ending in ``/v1``: as given, as the environment has it, or the usual one."""
    base = (url or os.environ.get("SAGE_UNIFIED_BASE_URL") or "http://127.0.0.1:8889/v1").rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def key_for(base: str, given: str | None) -> str | None:
    """Return the key to send to `base`: as given, as the environment has it, or this user's own."""
    from sagellm.cli.own_key import own_key

    return given or os.environ.get("SAGE_UNIFIED_API_KEY") or own_key(base)
