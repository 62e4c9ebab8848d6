"""A module that stands for another: every old import path is one such module of two lines.

`forward(__name__)` turns the calling module into a view of its successor in `sagellm.migrate.table`: reading, setting and
deleting attributes reach the new module (so ``mock.patch`` on an old path patches the real thing), the objects are the same,
and the import warns once, at the line that imported it.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from types import ModuleType
from typing import Any

from sagellm.migrate.table import MODULES, NAMES, OLD_ROOTS, REMOVAL_VERSION, REMOVED, Removed, resolve_name

__all__ = ["forward", "warn_deprecated"]

_SWITCH = "SAGELLM_DEPRECATIONS"
_MACHINERY = {"importlib", "runpy"}


def forward(old: str) -> None:
    """Make the module `old`, which is being imported, stand for its successor.

    Raises:
        ImportError: the module has no successor; the message says what to use.
        DeprecationWarning: if ``SAGELLM_DEPRECATIONS=error``.
    """
    module = sys.modules[old]
    successor = MODULES.get(old)
    if successor is None and old in REMOVED and not _has_names(old):
        raise ImportError(f"{old} has no successor: {REMOVED[old]}", name=old)
    module.__class__ = _Forwarding
    warn_deprecated(old, successor or "the module named by each of its names in docs/migration.md")


def warn_deprecated(old: str, new: str) -> None:
    """Warn, at the nearest line outside the import machinery and the forwarding modules, that `old` is now `new`.

    ``SAGELLM_DEPRECATIONS`` chooses: ``once`` (default), ``silent`` or ``error``.
    """
    mode = os.environ.get(_SWITCH, "once")
    if mode == "silent":
        return
    message = (
        f"{old} is deprecated and will be removed in {REMOVAL_VERSION}: use {new} (`sage-llm migrate` rewrites it)"
    )
    if mode == "error":
        raise DeprecationWarning(message)
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame.f_globals.get("__name__", ""), frame.f_code.co_filename):
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        DeprecationWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "__main__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


class _Forwarding(ModuleType):
    """Attribute access goes to the successor; private and import-system attributes stay."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        holder, attribute = _successor(self.__name__, name)
        try:
            return getattr(holder, attribute)
        except AttributeError:
            where = holder.__name__
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} (looked in {where})") from None

    def __setattr__(self, name: str, value: object) -> None:
        if _stays(self.__name__, name, value):
            super().__setattr__(name, value)
        else:
            holder, attribute = _successor(self.__name__, name)
            setattr(holder, attribute, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            holder, attribute = _successor(self.__name__, name)
            delattr(holder, attribute)

    def __dir__(self) -> list[str]:
        successor = MODULES.get(self.__name__)
        return dir(importlib.import_module(successor)) if successor else sorted(self.__dict__)

    @property
    def __all__(self) -> list[str]:
        successor = MODULES.get(self.__name__)
        module = importlib.import_module(successor) if successor else None
        return list(getattr(module, "__all__", []))


def _successor(old: str, name: str) -> tuple[ModuleType, str]:
    target = resolve_name(old, name)
    if isinstance(target, Removed):
        raise ImportError(  # noqa: TRY004 - a name is missing, no type is wrong
            f"{target.old} has no successor: {target.hint}", name=old
        )
    if target is None or target.name is None:
        raise AttributeError(f"module {old!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        extra = "gateway" if target.module.startswith("sagellm_gateway") else "all"
        raise ImportError(
            f"{old}.{name} is {target.path} now: pip install 'isagellm[{extra}]' ({error})", name=old
        ) from error
    return module, target.name


def _stays(old: str, name: str, value: object) -> bool:
    """The import system's own attributes, and a submodule that it binds to its parent."""
    return name.startswith("__") or (isinstance(value, ModuleType) and value.__name__ == f"{old}.{name}")


def _has_names(old: str) -> bool:
    return any(module == old for module, _ in NAMES)


def _is_machinery(module: str, filename: str) -> bool:
    return (
        filename.startswith("<frozen importlib")
        or module.partition(".")[0] in _MACHINERY
        or module == __name__
        or _is_old(module)
    )


def _is_old(module: str) -> bool:
    return any(module == root or module.startswith(root + ".") for root in OLD_ROOTS)
