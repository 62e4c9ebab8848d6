"""Wheels of isagellm 0.1 - 0.5 beside this release: they fill the same import packages, and pip does not know that they clash.

Found by folder names alone, because on such a machine an import of ours may reach a module of theirs.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sagellm._version import __version__

__all__ = ["cure", "old_distributions"]

# The old distributions whose import packages are ours now.
_OLD = re.compile(
    r"(isagellm[-_.](?:core|protocol|backend|gateway|control[-_.]plane)|isage[-_.]llm[-_.](?:core|gateway))-(\d[^-]*)\.dist-info",
    re.IGNORECASE,
)
# Their companions have packages of their own, but need the clashing ones: they go together.
_COMPANION = re.compile(
    r"(isagellm[-_.](?:kv[-_.]cache|comm|compression|benchmark|dev[-_.]tools))-(\d[^-]*)\.dist-info", re.IGNORECASE
)
_SHIMS = {"isage-llm-core", "isage-llm-gateway"}


def old_distributions(path: Iterable[str] = sys.path) -> list[str]:
    """Return ``name version`` of each old distribution in the folders of `path`; the shims of this release are not old."""
    return sorted({f"{n} {v}" for n, v in _found(_OLD, path) if n not in _SHIMS or v != __version__})


def cure(old: Iterable[str], path: Iterable[str] = sys.path) -> str:
    """Return the one command that leaves a clean installation of this release, from where it came; extras stay installed."""
    path = list(path)
    names = dict.fromkeys(
        ["isagellm", *(item.split()[0] for item in old), *sorted(n for n, _ in _found(_COMPANION, path))]
    )
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip"):
        remove, install = f"{python} -m pip uninstall -y", f"{python} -m pip install"
    else:  # uv makes environments without pip
        remove, install = f"uv pip uninstall --python {python}", f"uv pip install --python {python}"
    return f"{remove} {' '.join(names)} && {install} {_origin(path)}"


def _found(pattern: re.Pattern[str], path: Iterable[str]) -> Iterator[tuple[str, str]]:
    for folder in path:
        directory = Path(folder or ".")
        names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
        for match in filter(None, map(pattern.fullmatch, names)):
            yield match[1].replace("_", "-").replace(".", "-").lower(), match[2]


def _origin(path: Iterable[str]) -> str:
    """Return what to install: the file or folder that this release came from (PEP 610), or its version of the package index."""
    for folder in path:
        record = Path(folder) / f"isagellm-{__version__}.dist-info" / "direct_url.json"
        if record.is_file():
            came = json.loads(record.read_text(encoding="utf-8"))
            url = urlsplit(came["url"])
            if url.scheme == "file" and (source := Path(unquote(url.path))).exists():
                editable = "-e " if came.get("dir_info", {}).get("editable") else ""
                return editable + shlex.quote(str(source))
    return f"'isagellm=={__version__}'"
