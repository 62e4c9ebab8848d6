"""isagellm: the umbrella. What a person touches: the client and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sagellm._version import __version__

if TYPE_CHECKING:
    from sagellm.client import AsyncUnifiedInferenceClient, UnifiedInferenceClient

__all__ = ["AsyncUnifiedInferenceClient", "UnifiedInferenceClient", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the client when it is first asked for: ``import sagellm`` alone stays instant."""
    if name in {"AsyncUnifiedInferenceClient", "UnifiedInferenceClient"}:
        from sagellm import client

        return getattr(client, name)
    from sagellm.migrate.packages import resolve

    return resolve(__name__, name)
