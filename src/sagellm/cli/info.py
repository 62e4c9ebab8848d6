"""``sage-llm info``."""

from __future__ import annotations

import os
import platform
import sys
from typing import Annotated, Any

from sagellm import store
from sagellm._version import __version__
from sagellm.cli.common import JsonOption, human_bytes, print_json, single
from sagellm_protocol.errors import SageError


def info(as_json: Annotated[bool, JsonOption] = False) -> None:
    """Show this installation and machine."""
    facts = collect()
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {_shown(name, value)}")


def collect() -> dict[str, Any]:
    """Return the facts, JSON-ready."""
    from sagellm_backend import registry

    return {
        "version": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "backends": {name: _state(name) for name in registry.known()},
        "store": str(store.home()),
        "models": [model.name for model in store.installed()],
    }


def _state(backend: str) -> str:
    """Return ``ok``, or why the backend cannot run here."""
    from sagellm_backend import registry

    try:
        return registry.load(backend).available() or "ok"
    except SageError as error:
        return str(error)


def _shown(name: str, value: Any) -> str:
    if name == "memory_bytes":
        return human_bytes(value)
    if isinstance(value, dict):
        return "; ".join(f"{key}: {state}" for key, state in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


app = single(info)
