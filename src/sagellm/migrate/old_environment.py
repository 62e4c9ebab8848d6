"""Environment variables of the old gateway: each known one sets its successor, every one warns."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from sagellm.migrate.forward import warn_deprecated

__all__ = ["RENAMED", "translate_gateway_environment"]

RENAMED = {
    "SAGE_GATEWAY_HOST": "SAGELLM_HOST",
    "SAGE_GATEWAY_PORT": "SAGELLM_PORT",
    "SAGE_GATEWAY_STATE": "SAGELLM_STATE",
    "SAGE_GATEWAY_POLICY": "SAGELLM_POLICY",
}
"""Old variable -> the one that `sage-llm gateway` reads. (``SAGE_CHAT_*``, ``SAGE_EMBEDDING_*`` and ``SAGE_UNIFIED_*`` are still
the client's own.)"""


def translate_gateway_environment(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Set the new variables from the old ones, where they are not set; return the old ones that mean nothing any more.

    A variable without a successor is warned of too: it is never ignored in silence.
    """
    unknown = []
    for old in sorted(name for name in environ if name.startswith("SAGE_GATEWAY_")):
        new = RENAMED.get(old)
        if new is None:
            unknown.append(old)
            warn_deprecated(
                f"environment variable {old}", "`sage-llm gateway --help`: it has no successor and is not read"
            )
            continue
        warn_deprecated(f"environment variable {old}", new)
        environ.setdefault(new, environ[old])
    return unknown
