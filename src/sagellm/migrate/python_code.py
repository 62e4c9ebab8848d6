"""Rewrite Python source from the old names to the new, with libcst: what is not an old name stays byte for byte.

Rewritten: ``import a.b``, ``import a.b as c``, ``from a import b as c``, dotted uses of a plainly imported module, strings
that are nothing but an old path (``mock.patch``, ``import_module``, ``"pkg.server:app"``), keyword arguments that moved.
A module that binds an old root otherwise (``sage = ...``) keeps its dotted uses, and the report says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from sagellm.migrate.table import KEYWORDS, MODULES, OLD_ROOTS, Removed, Target, resolve_name, resolve_path

__all__ = ["CodeResult", "mentions_old_names", "rewrite_python"]

_HINT = re.compile(
    rb"sage\s*\.\s*llm|from\s+sage\s+import|import\s+sage\b|sagellm_control\b(?!_)|\bisagellm?-|\bisage-llm-"
)
_PATH = re.compile(r"(?:sage\.llm|sagellm_control)(?:\.\w+)*(?::\w+(?:\.\w+)*)?")


@dataclass(slots=True)
class CodeResult:
    """The new source and what happened.

    Attributes:
        source: the rewritten file; the same object as the input when nothing changed.
        changes: number of names rewritten.
        left: (line, text) of old names that have no successor or cannot be rewritten safely; they want a hand.
        notes: (line, text) of strings that mention an old name inside other text; left as they are.
    """

    source: bytes
    changes: int = 0
    left: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)


def mentions_old_names(source: bytes) -> bool:
    """Whether it is worth parsing `source`; cheap, and never wrong when it says no."""
    return _HINT.search(source) is not None


def rewrite_python(source: bytes) -> CodeResult:
    """Rewrite one Python file.

    Raises:
        libcst.ParserSyntaxError: it is not Python 3.
        UnicodeDecodeError: it is not in the encoding that it declares.
    """
    module = cst.parse_module(source)
    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    survey = _Survey()
    wrapper.visit(survey)
    rewriter = _Rewriter(survey)
    changed = wrapper.visit(rewriter)
    result = CodeResult(source, rewriter.changes, rewriter.left, rewriter.notes)
    if rewriter.changes:
        result.source = changed.bytes
    return result


def _dotted(node: cst.BaseExpression) -> str | None:
    """``a.b.c`` as text, or None for anything but names and attributes."""
    parts: list[str] = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    if not isinstance(node, cst.Name):
        return None
    return ".".join([node.value, *reversed(parts)])


def _expression(path: str) -> cst.Attribute | cst.Name:
    node: cst.Attribute | cst.Name = cst.Name(path.split(".", maxsplit=1)[0])
    for part in path.split(".")[1:]:
        node = cst.Attribute(node, cst.Name(part))
    return node


def _is_old(path: str) -> bool:
    return any(path == root or path.startswith(root + ".") for root in OLD_ROOTS)


class _Survey(cst.CSTVisitor):
    """First pass: which old roots are bound by plain imports, which local names stand for old callables."""

    def __init__(self) -> None:
        super().__init__()
        self.plain_roots: set[str] = set()
        self.rebound: set[str] = set()
        self.callables: dict[str, str] = {}
        self.needed: set[str] = set()

    def visit_Import(self, node: cst.Import) -> bool:
        for alias in node.names:
            path = _dotted(alias.name)
            if path and alias.asname is None and _is_old(path):
                self.plain_roots.add(path.split(".")[0])
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        module = _dotted(node.module) if node.module is not None and not node.relative else None
        if module is not None and _is_old(module) and not isinstance(node.names, cst.ImportStar):
            for alias in node.names:
                name = alias.evaluated_name
                if name in KEYWORDS:
                    self.callables[alias.evaluated_alias or name] = name
        return False

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        if isinstance(node.target, cst.Name):
            self.rebound.add(node.target.value)

    def visit_Param(self, node: cst.Param) -> None:
        self.rebound.add(node.name.value)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        path = _dotted(node)
        resolved = resolve_path(path) if path else None
        if resolved is not None and isinstance(resolved[0], Target):
            self.needed.add(resolved[0].module)
        return path is None

    def rewrites_chain(self, path: str) -> bool:
        """Whether the dotted use `path` means the old package and nothing else."""
        root = path.split(".", maxsplit=1)[0]
        return root in self.plain_roots and root not in self.rebound


class _Rewriter(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, survey: _Survey) -> None:
        super().__init__()
        self.survey = survey
        self.changes = 0
        self.left: list[tuple[int, str]] = []
        self.notes: list[tuple[int, str]] = []
        self._chains: dict[cst.CSTNode, cst.BaseExpression] = {}
        self._docstrings: set[cst.CSTNode] = set()
        self._imports_done = False

    # -- imports ---------------------------------------------------------------------------------------------------------

    def visit_Import(self, _node: cst.Import) -> bool:
        return False

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        names: list[cst.ImportAlias] = []
        changed = False
        for alias in updated_node.names:
            path = _dotted(alias.name)
            resolved = resolve_path(path) if path else None
            if resolved is None:
                names.append(alias)
                continue
            target, rest = resolved
            if isinstance(target, Removed):
                self._leave(original_node, f"import {target.old}: {target.hint}")
                names.append(alias)
                continue
            if alias.asname is None and not self.survey.rewrites_chain(path or ""):
                self._leave(
                    original_node, f"import {path}: its root is bound to something else here; use `import ... as`"
                )
                names.append(alias)
                continue
            names.append(alias.with_changes(name=_expression(target.path + rest)))
            changed = True
        if not changed:
            return updated_node
        self.changes += 1
        if not self._imports_done and any(a.asname is None for a in names):
            self._imports_done = True
            have = {_dotted(a.name) for a in names}
            missing = sorted(m for m in self.survey.needed if m not in have and not _prefix_of_any(m, have))
            if missing:
                names[-1] = names[-1].with_changes(comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")))
                names += [
                    cst.ImportAlias(_expression(m), comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")))
                    for m in missing
                ]
                names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated_node.with_changes(names=_unique(names))

    def visit_ImportFrom(self, _node: cst.ImportFrom) -> bool:
        return False

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        if not any(isinstance(s, cst.ImportFrom) for s in updated_node.body):
            return updated_node
        groups = [
            self._import_from(original, statement) if isinstance(statement, cst.ImportFrom) else [statement]
            for original, statement in zip(original_node.body, updated_node.body, strict=True)
        ]
        if all(len(group) == 1 for group in groups):
            return updated_node.with_changes(body=[group[0] for group in groups])
        flat = [statement for group in groups for statement in group]
        lines = [cst.SimpleStatementLine([s.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)]) for s in flat]
        inner = [cst.EmptyLine(comment=comment) for comment in _comments(updated_node.body)]
        lines[0] = lines[0].with_changes(leading_lines=[*updated_node.leading_lines, *inner])
        lines[-1] = lines[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        return cst.FlattenSentinel(lines)

    def _import_from(self, original: cst.CSTNode, node: cst.ImportFrom) -> list[cst.BaseSmallStatement]:
        module = _dotted(node.module) if node.module is not None and not node.relative else None
        if module is None or not (_is_old(module) or module == "sage"):
            return [node]
        if isinstance(node.names, cst.ImportStar):
            if module not in MODULES:
                if _is_old(module):
                    self._leave(original, f"from {module} import *: name what is imported")
                return [node]
            self.changes += 1
            return [node.with_changes(module=_expression(MODULES[module]))]
        moves = [(alias, self._move(original, module, alias)) for alias in node.names]
        if all(move is None for _, move in moves):
            return [node]
        self.changes += sum(move is not None for _, move in moves)
        homes = {move[0] if move else module for _, move in moves}
        if len(homes) == 1 and None not in homes:
            names = [
                alias.with_changes(name=cst.Name(move[1]), asname=_kept(alias, move[1]))
                for alias, move in moves
                if move
            ]
            return [node.with_changes(module=_expression(next(iter(homes)) or ""), names=names)]
        return self._split(module, moves)

    def _move(self, original: cst.CSTNode, module: str, alias: cst.ImportAlias) -> tuple[str | None, str] | None:
        """(new module or None for a top-level package, new name), or None where the alias stays."""
        name = _dotted(alias.name) or ""
        target = resolve_name(module, name) if module != "sage" else (Target("sagellm") if name == "llm" else None)
        if isinstance(target, Removed):
            self._leave(original, f"from {module} import {name}: {target.hint}")
            return None
        if target is None:
            if _is_old(module):
                self._leave(original, f"from {module} import {name}: not a public name of any version")
            return None
        if target.name is not None:
            return target.module, target.name
        parent, _, leaf = target.module.rpartition(".")
        return parent or None, leaf

    def _split(
        self,
        module: str,
        moves: Sequence[tuple[cst.ImportAlias, tuple[str | None, str] | None]],
    ) -> list[cst.BaseSmallStatement]:
        homes: dict[str | None, list[cst.ImportAlias]] = {}
        for alias, move in moves:
            home, name = move if move is not None else (module, _dotted(alias.name) or "")
            plain = cst.ImportAlias(cst.Name(name), asname=_kept(alias, name))
            homes.setdefault(home, []).append(plain)
        statements: list[cst.BaseSmallStatement] = []
        for home, aliases in homes.items():
            if home is None:
                statements += [cst.Import([alias]) for alias in aliases]
            else:
                statements.append(cst.ImportFrom(_expression(home), aliases))
        return statements

    # -- uses ------------------------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        path = _dotted(node)
        if path is None:
            return True
        resolved = resolve_path(path)
        if resolved is None or not self.survey.rewrites_chain(path):
            return False
        target, rest = resolved
        if isinstance(target, Removed):
            self._leave(node, f"{path}: {target.hint}")
        else:
            self._chains[node] = _expression(target.path + rest)
        return False

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        new = self._chains.get(original_node)
        if new is None:
            return updated_node
        self.changes += 1
        return new

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        moved = KEYWORDS.get(self._callable(original_node.func) or "")
        if not moved:
            return updated_node
        args: list[cst.Arg] = []
        for arg in updated_node.args:
            new = moved.get(arg.keyword.value) if arg.keyword is not None else None
            if new is not None:
                self.changes += 1
            args.append(arg.with_changes(keyword=cst.Name(new)) if new is not None else arg)
        return updated_node.with_changes(args=args)

    def _callable(self, func: cst.BaseExpression) -> str | None:
        path = _dotted(func)
        if path is None:
            return None
        root, _, rest = path.partition(".")
        if root in self.survey.callables:
            return self.survey.callables[root] + (f".{rest}" if rest else "")
        if _is_old(path) and self.survey.rewrites_chain(path):
            name = path.rpartition(".")[2]
            tail = ".".join(path.split(".")[-2:])
            return tail if tail in KEYWORDS else name
        return None

    # -- strings ---------------------------------------------------------------------------------------------------------

    def visit_Expr(self, node: cst.Expr) -> None:
        if isinstance(node.value, cst.SimpleString | cst.ConcatenatedString):
            self._docstrings.add(node.value)

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString) -> cst.BaseExpression:
        raw = updated_node.value
        if "sage" not in raw or "b" in updated_node.prefix.lower():
            return updated_node
        inner = updated_node.raw_value
        found = _PATH.search(inner)
        if found is None:
            return updated_node
        if found.group() != inner or original_node in self._docstrings:
            self.notes.append((self._line(original_node), f"text mentions {found.group()}"))
            return updated_node
        new = self._string(original_node, inner)
        if new is None:
            return updated_node
        self.changes += 1
        quote = len(updated_node.prefix) + len(updated_node.quote)
        return updated_node.with_changes(value=raw[:quote] + new + updated_node.quote)

    def _string(self, node: cst.CSTNode, text: str) -> str | None:
        path, colon, attribute = text.partition(":")
        resolved = resolve_path(f"{path}.{attribute}" if colon else path)
        if resolved is None:
            return None
        target, rest = resolved
        if isinstance(target, Removed):
            self._leave(node, f'"{text}": {target.hint}')
            return None
        if not colon:
            return target.path + rest
        return f"{target.module}:{target.name or ''}{rest}"

    def _line(self, node: cst.CSTNode) -> int:
        return int(self.get_metadata(PositionProvider, node).start.line)

    def _leave(self, node: cst.CSTNode, text: str) -> None:
        self.left.append((self._line(node), text))


def _kept(alias: cst.ImportAlias, new_name: str) -> cst.AsName | None:
    """The alias that keeps the name by which the rest of the file knows it."""
    if alias.asname is not None:
        return alias.asname
    old = _dotted(alias.name)
    return None if old == new_name else cst.AsName(cst.Name(old or ""))


def _comments(statements: Sequence[cst.BaseSmallStatement]) -> list[cst.Comment]:
    """Comments inside the parentheses of statements that are about to be split."""
    found: list[cst.Comment] = []

    class _Collect(cst.CSTVisitor):
        def visit_Comment(self, node: cst.Comment) -> None:
            found.append(node)

    for statement in statements:
        statement.visit(_Collect())
    return found


def _prefix_of_any(module: str, paths: set[str | None]) -> bool:
    return any(path is not None and path.startswith(module + ".") for path in paths)


def _unique(names: list[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Two old modules may have one successor: import it once."""
    seen: set[tuple[str | None, str | None]] = set()
    kept: list[cst.ImportAlias] = []
    for alias in names:
        key = (_dotted(alias.name), alias.evaluated_alias)
        if key not in seen:
            seen.add(key)
            kept.append(alias)
    kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return kept
