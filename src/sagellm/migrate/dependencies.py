"""Rename distributions in dependency files, a line at a time, touching nothing else of the line.

An old requirement ``isage-llm-gateway[x]>=0.2,<1 ; python_version < "3.12"  # why`` becomes
``isagellm[gateway]>=0.6.0 ; python_version < "3.12"  # why``: the name, its extras and its version range are replaced (the old
range speaks of versions that the new distribution never had), the marker and the comment stay.
"""

from __future__ import annotations

import re

from sagellm.migrate.table import DISTRIBUTIONS, NEW_VERSION

__all__ = ["is_dependency_file", "rename_requirements"]

_NAME = "|".join(sorted((re.escape(name).replace(r"\-", "[-_.]") for name in DISTRIBUTIONS), key=len, reverse=True))
_VERSION = r"(?:\s*(?:===|==|~=|!=|<=|>=|<|>|\^|=)\s*[\w.*+!-]+(?:\s*,\s*(?:===|==|~=|!=|<=|>=|<|>|\^)\s*[\w.*+!-]+)*)?"
_REQUIREMENT = re.compile(
    rf"(?<![\w./@-])(?P<name>{_NAME})(?P<extras>\s*\[[\w\s,.-]*\])?(?P<version>{_VERSION})(?![\w-])", re.IGNORECASE
)
_POETRY = re.compile(
    rf"^(?P<indent>\s*)(?P<quote>[\"']?)(?P<name>{_NAME})(?P=quote)(?P<equals>\s*=\s*)(?P<value>.+?)(?P<end>\s*(?:#.*)?)$",
    re.IGNORECASE,
)
_FILES = re.compile(
    r"(?:^|/)(?:pyproject\.toml|setup\.cfg|setup\.py|[^/]*requirements[^/]*\.(?:txt|in)|requirements/[^/]+\.(?:txt|in)"
    r"|constraints[^/]*\.txt|(?:conda-)?env(?:ironment)?[^/]*\.ya?ml|tox\.ini|Pipfile)$"
)


def is_dependency_file(path: str) -> bool:
    """Whether the file of this (posix) path lists distributions."""
    return _FILES.search(path) is not None


def rename_requirements(text: str, path: str) -> tuple[str, int]:
    """Return `text` with the old distributions renamed, and how many were."""
    toml = path.endswith((".toml", "Pipfile"))
    count = 0
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        body = line.rstrip("\r\n")
        new, n = _rename_line(body, toml=toml, code=path.endswith((".py", ".toml", "Pipfile")))
        if n:
            lines[number] = new + line[len(body) :]
            count += n
    return "".join(lines), count


def _rename_line(line: str, *, toml: bool, code: bool) -> tuple[str, int]:
    stripped = line.lstrip()
    if stripped.startswith("#"):
        return line, 0
    if toml:
        table = _POETRY.match(line)
        if table is not None:
            return _poetry(table), 1
    comment = _comment_start(line)
    head, tail = line[:comment], line[comment:]
    if code and not re.search(rf"[\"'](?:{_NAME})", head, re.IGNORECASE):
        return line, 0
    new, n = _REQUIREMENT.subn(lambda m: f"{_successor(m['name'])}>={NEW_VERSION}", head)
    return new + tail, n


def _successor(name: str) -> str:
    return DISTRIBUTIONS[re.sub(r"[-_.]+", "-", name).lower()]


def _poetry(match: re.Match[str]) -> str:
    successor = _successor(match["name"])
    base, _, extras = successor.partition("[")
    version = f'"^{NEW_VERSION}"'
    value = f'{{ version = {version}, extras = ["{extras.rstrip("]")}"] }}' if extras else version
    return f"{match['indent']}{match['quote']}{base}{match['quote']}{match['equals']}{value}{match['end']}"


def _comment_start(line: str) -> int:
    """Where a trailing ``# comment`` begins (a # inside quotes does not count)."""
    quote = ""
    for i, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "#" and (i == 0 or line[i - 1].isspace()):
            return i
    return len(line)
