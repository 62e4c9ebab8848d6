"""The architecture checker: no import of a deprecated path, and the layer rules of a TOML table.

::

    [arch]
    deprecated = ["sage.llm"]                 # no import, no string that is such a path

    [[arch.forbidden]]
    modules = ["app.cli"]
    imports = ["sagellm_core", "sagellm_backend"]
    why = "a command line talks to UnifiedInferenceClient"

    [[arch.layers]]                           # a module imports only from its own and lower lines
    order = [["app.cli"], ["app.service", "app.jobs"], ["app.domain"]]

Static: it reads the files with the standard library's parser and runs none of them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sagellm.migrate.table import OLD_ROOTS, Removed, resolve_path

__all__ = ["PROFILES", "Finding", "Rules", "check_tree", "load_rules"]


class Forbidden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`modules` (and what lies below them) import none of `imports`."""

    modules: tuple[str, ...]
    imports: tuple[str, ...]
    why: str = ""


class Layers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From top to bottom; modules on one line do not import each other."""

    order: tuple[tuple[str, ...], ...]


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `check_tree` looks for."""

    deprecated: tuple[str, ...] = OLD_ROOTS
    forbidden: tuple[Forbidden, ...] = ()
    layers: tuple[Layers, ...] = ()


PROFILES: dict[str, Rules] = {
    "consumer": Rules(
        forbidden=(
            Forbidden(
                modules=("*.cli", "*.commands"),
                imports=("sagellm_core", "sagellm_backend"),
                why="a command line layer talks to an engine through sagellm.UnifiedInferenceClient",
            ),
        ),
    ),
    "isagellm": Rules(
        forbidden=(
            Forbidden(
                ("sagellm_gateway",), ("sagellm_core", "sagellm_backend"), "engines are reached through the ports"
            ),
            Forbidden(
                ("sagellm_protocol", "sagellm_control_plane", "sagellm_gateway"),
                ("torch", "numpy", "triton", "tokenizers"),
                "the gateway process stays small",
            ),
            Forbidden(
                ("sagellm_protocol", "sagellm_backend", "sagellm_core"),
                ("httpx2", "starlette", "uvicorn"),
                "no HTTP below",
            ),
        ),
        layers=(
            Layers(
                (
                    ("sagellm",),
                    ("sagellm_gateway",),
                    ("sagellm_control_plane", "sagellm_core"),
                    ("sagellm_backend",),
                    ("sagellm_protocol",),
                )
            ),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule at one place."""

    path: str
    line: int
    rule: str
    message: str


@dataclass(frozen=True, slots=True)
class _Use:
    line: int
    target: str
    text: bool = False


def load_rules(path: Path) -> Rules:
    """Read the ``[arch]`` table of a TOML file (or ``[tool.sagellm.arch]`` of a pyproject.toml).

    Raises:
        ValueError: not TOML, no such table, or an unknown key in it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    table = data.get("arch") or data.get("tool", {}).get("sagellm", {}).get("arch")
    if table is None:
        raise ValueError(f"{path} has no [arch] table (nor [tool.sagellm.arch]): see `sage-llm arch --help`")
    try:
        return msgspec.convert(table, Rules)
    except msgspec.ValidationError as error:
        raise ValueError(f"[arch] in {path}: {error}") from error


def check_tree(root: Path, rules: Rules) -> Iterator[Finding]:
    """Yield what breaks `rules` below `root`, by file and line."""
    from sagellm.migrate.tree import find_files

    for path in find_files(root):
        if path.suffix not in (".py", ".pyi"):
            continue
        try:
            tree = ast.parse(path.read_bytes(), filename=str(path))
        except (SyntaxError, ValueError) as error:
            yield Finding(str(path), getattr(error, "lineno", 1) or 1, "unparsed", f"not Python 3: {error}")
            continue
        module, package = _module_name(path)
        yield from _check(str(path), module, sorted(_uses(tree, package), key=lambda u: u.line), rules)


def _check(path: str, module: str, uses: Iterable[_Use], rules: Rules) -> Iterator[Finding]:
    seen: set[tuple[int, str]] = set()
    for use in uses:
        for old in rules.deprecated:
            if _below(use.target, old) and (use.line, old) not in seen:
                seen.add((use.line, old))
                what = "names" if use.text else "imports"
                yield Finding(path, use.line, "deprecated", f"{what} {use.target}: {_advice(use.target)}")
        if use.text:
            continue
        for rule in rules.forbidden:
            hit = next((i for i in rule.imports if _below(use.target, i)), None)
            if hit is not None and any(_matches(module, m) for m in rule.modules):
                yield Finding(
                    path,
                    use.line,
                    "forbidden",
                    f"{module} imports {use.target}" + (f": {rule.why}" if rule.why else ""),
                )
        for layers in rules.layers:
            mine, theirs = _line_of(module, layers), _line_of(use.target, layers)
            if mine is None or theirs is None or mine[1] == theirs[1] or mine[0] < theirs[0]:
                continue
            where = "a sibling of it" if mine[0] == theirs[0] else "above it"
            yield Finding(path, use.line, "layers", f"{module} imports {use.target}, which is {where}")


def _advice(target: str) -> str:
    resolved = resolve_path(target)
    if resolved is None:
        return "it is deprecated"
    found, rest = resolved
    return (
        found.hint if isinstance(found, Removed) else f"it is {found.path}{rest} now (`sage-llm migrate` rewrites it)"
    )


def _uses(tree: ast.AST, package: str) -> Iterator[_Use]:
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (_Use(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield from (
                _Use(node.lineno, f"{base}.{alias.name}" if alias.name != "*" else base) for alias in node.names
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            path = node.value.replace(":", ".", 1)
            if re.fullmatch(r"\w+(?:\.\w+)+|sagellm_control", path):
                yield _Use(node.lineno, path, text=True)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _module_name(path: Path) -> tuple[str, str]:
    """(dotted module, its package), by walking up while there is an ``__init__.py``."""
    folder = path.parent.resolve()
    parts = [] if path.stem == "__init__" else [path.stem]
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    module = ".".join(parts) or path.stem
    return module, module if path.stem == "__init__" else module.rpartition(".")[0]


def _below(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def _matches(module: str, pattern: str) -> bool:
    """A leading ``*.`` stands for any package (or none)."""
    if pattern.startswith("*."):
        return re.search(rf"(?:^|\.){re.escape(pattern[2:])}(?:\.|$)", module) is not None
    return _below(module, pattern)


def _line_of(module: str, layers: Layers) -> tuple[int, str] | None:
    hits = [(i, m) for i, line in enumerate(layers.order) for m in line if _below(module, m)]
    return max(hits, key=lambda hit: len(hit[1])) if hits else None
