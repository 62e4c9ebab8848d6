"""Wheels of isagellm 0.1 - 0.5 beside this release: they fill the same import packages, and pip does not know that they clash.

Found by folder names alone, because on such a machine an import of ours may reach a module of theirs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from sagellm._version import __version__

__all__ = ["cure", "old_distributions"]

# The old distributions whose import packages are ours now.
_OLD = re.compile(
    r"(isagellm[-_.](?:core|protocol|backend|gateway|control[-_.]plane)|isage[-_.]llm[-_.](?:core|gateway))-(\d[^-]*)\.dist-info",
    re.IGNORECASE,
)
_SHIMS = {"isage-llm-core", "isage-llm-gateway"}


def old_distributions(path: Iterable[str] = sys.path) -> list[str]:
    """Return ``name version`` of each old distribution in the folders of `path`; the shims of this release are not old."""
    found: set[str] = set()
    for folder in path:
        directory = Path(folder or ".")
        names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
        for match in filter(None, map(_OLD.fullmatch, names)):
            name, version = match[1].replace("_", "-").replace(".", "-").lower(), match[2]
            if name not in _SHIMS or version != __version__:
                found.add(f"{name} {version}")
    return sorted(found)


def cure(old: Iterable[str]) -> str:
    """Return the one command that leaves a clean installation."""
    names = " ".join(item.split()[0] for item in old)
    remove = f"{sys.executable} -m pip uninstall -y isagellm {names}".rstrip()
    return f"{remove} && {sys.executable} -m pip install 'isagellm=={__version__}'"
