"""Where models live on this machine: names, pull, list, remove. Nothing here loads weights or opens a socket at import."""

from __future__ import annotations

from sagellm.store.catalog import CATALOG, DEFAULT_MODEL, CatalogEntry
from sagellm.store.layout import ModelName, StoredModel, copy, find, home, installed, remove, resolve

__all__ = [
    "CATALOG",
    "DEFAULT_MODEL",
    "CatalogEntry",
    "ModelName",
    "StoredModel",
    "copy",
    "find",
    "home",
    "installed",
    "remove",
    "resolve",
]
