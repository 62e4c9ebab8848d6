"""Rewrite Python source from the old names to the new: what is not an old name stays byte for byte.

The standard library's parser finds the places, each edit replaces just its own span, and libcst rewrites an import statement so
that its layout and comments stay. Rewritten: ``import a.b``, ``import a.b as c``, ``from a import b as c``, dotted uses of a
plainly imported module, strings that are nothing but an old path (``mock.patch``, ``import_module``, ``"pkg.server:app"``),
keyword arguments that moved. A module that binds an old root otherwise (``sage = ...``) keeps its dotted uses, and the report
says so.
"""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import libcst as cst

from sagellm.migrate.table import KEYWORDS, MODULES, OLD_ROOTS, Removed, Target, resolve_name, resolve_path

__all__ = ["CodeResult", "mentions_old_names", "rewrite_python"]

_HINT = re.compile(
    rb"sage\s*\.\s*llm|from\s+sage\s+import|import\s+sage\b|sagellm_control\b|\bisage-llm-|\bisagellm-", re.IGNORECASE
)
_PATH = re.compile(r"(?:sage\.llm|sagellm_control)\b(?:\.\w+)*(?::\w+(?:\.\w+)*)?")
_LITERAL = re.compile(r"""(?P<open>[rRuU]?(?:\"\"\"|'''|"|'))(?P<text>[^"'\\\n]*)(?P<close>\"\"\"|'''|"|')""")
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|$)")


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
        SyntaxError: it is not Python 3, or declares an encoding that does not exist.
        UnicodeDecodeError: it is not in the encoding that it declares.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    text = source.decode(encoding).encode("utf-8")
    rewriter = _Rewriter(text, ast.parse(text))
    rewriter.run()
    result = CodeResult(source, rewriter.changes, rewriter.left, rewriter.notes)
    if rewriter.edits:
        new = rewriter.edited().decode("utf-8").encode(encoding)
        result.source = new if encoding != "utf-8-sig" or new.startswith(codecs.BOM_UTF8) else codecs.BOM_UTF8 + new
    return result


class _Rewriter:
    """One file: its places by line, the edits that were decided, the report."""

    def __init__(self, text: bytes, tree: ast.Module) -> None:
        self.text = text
        self.tree = tree
        self.starts = [0, *(match.end() for match in _LINE.finditer(text))]
        self.edits: list[tuple[int, int, str]] = []
        self.changes = 0
        self.left: list[tuple[int, str]] = []
        self.notes: list[tuple[int, str]] = []
        self.plain_roots: set[str] = set()
        self.rebound: set[str] = set()
        self.callables: dict[str, str] = {}
        self.needed: set[str] = set()

    def run(self) -> None:
        """Decide every edit."""
        nodes = list(_walk(self.tree))
        for node in nodes:
            self._survey(node)
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Attribute):
                self._chain(node)
            elif isinstance(node, ast.Call):
                self._keywords(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._string(node, node.value, prose=id(node) in docstrings)
        extend = True
        for node in nodes:
            if isinstance(node, ast.Import):
                extend = not self._import(node, extend=extend) and extend
            elif isinstance(node, ast.ImportFrom):
                self._import_from(node)

    def edited(self) -> bytes:
        """The text with every edit applied."""
        out, at = [], 0
        for start, end, new in sorted(self.edits):
            out += [self.text[at:start], new.encode("utf-8")]
            at = end
        return b"".join([*out, self.text[at:]])

    # -- first pass ------------------------------------------------------------------------------------------------------

    def _survey(self, node: ast.AST) -> None:
        """Which old roots plain imports bind, what rebinds them, which local names stand for old callables."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname is None and _is_old(alias.name):
                    self.plain_roots.add(alias.name.split(".")[0])
                elif alias.asname is not None:
                    self.rebound.add(alias.asname)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                self.rebound.add(alias.asname or alias.name)
                if not node.level and _is_old(node.module or "") and alias.name in KEYWORDS:
                    self.callables[alias.asname or alias.name] = alias.name
        else:
            name = _bound_name(node)
            if name is not None:
                self.rebound.add(name)

    def _means_old_package(self, path: str) -> bool:
        root = path.split(".", maxsplit=1)[0]
        return root in self.plain_roots and root not in self.rebound

    # -- uses ------------------------------------------------------------------------------------------------------------

    def _chain(self, node: ast.Attribute) -> None:
        path = _dotted(node)
        resolved = resolve_path(path) if path else None
        if path is None or resolved is None or not self._means_old_package(path):
            return
        target, rest = resolved
        if isinstance(target, Removed):
            self.left.append((node.lineno, f"{path}: {target.hint}"))
            return
        start, end = self._span(node)
        if re.sub(rb"\s", b"", self.text[start:end]) != path.encode():
            self.left.append((node.lineno, f"{path}: write {target.path}{rest} by hand here"))
            return
        self.needed.add(target.module)
        self._edit(start, end, target.path + rest)

    def _keywords(self, node: ast.Call) -> None:
        moved = KEYWORDS.get(self._callable(node.func) or "", {})
        for keyword in node.keywords:
            if keyword.arg in moved:
                start = self._offset(keyword.lineno, keyword.col_offset)
                self._edit(start, start + len(keyword.arg.encode()), moved[keyword.arg])

    def _callable(self, func: ast.expr) -> str | None:
        path = _dotted(func)
        if path is None:
            return None
        root, dot, rest = path.partition(".")
        if root in self.callables:
            return self.callables[root] + dot + rest
        if not _is_old(path) or not self._means_old_package(path):
            return None
        return next((name for name in KEYWORDS if path.endswith("." + name)), None)

    def _string(self, node: ast.Constant, value: str, *, prose: bool) -> None:
        found = _PATH.search(value)
        if found is None:
            return
        start, end = self._span(node)
        literal = _LITERAL.fullmatch(self.text[start:end].decode("utf-8", "replace"))
        if prose or found.group() != value or literal is None or literal["text"] != value:
            self.notes.append((node.lineno, f"text mentions {found.group()}"))
            return
        new = self._new_path(node.lineno, value)
        if new is not None:
            self._edit(start, end, literal["open"] + new + literal["close"])

    def _new_path(self, line: int, value: str) -> str | None:
        path, colon, attribute = value.partition(":")
        resolved = resolve_path(f"{path}.{attribute}" if colon else path)
        if resolved is None:
            return None
        target, rest = resolved
        if isinstance(target, Removed):
            self.left.append((line, f'"{value}": {target.hint}'))
            return None
        return f"{target.module}:{target.name or ''}{rest}" if colon else target.path + rest

    # -- imports ---------------------------------------------------------------------------------------------------------

    def _import(self, node: ast.Import, *, extend: bool) -> bool:
        """Rewrite ``import ...``; with `extend`, also import what rewritten uses need. Returns whether it did so."""
        if not any(_is_old(alias.name) for alias in node.names):
            return False
        start, end = self._span(node)
        statement = _parse(self.text[start:end])
        assert isinstance(statement, cst.Import)
        names: list[cst.ImportAlias] = []
        changes = 0
        for alias, parsed in zip(node.names, statement.names, strict=True):
            path = self._new_module(node, alias)
            changes += path is not None
            names.append(parsed if path is None else parsed.with_changes(name=_expression(path)))
        if not changes:
            return False
        plain = extend and any(alias.asname is None and _is_old(alias.name) for alias in node.names)
        if plain:
            have = {_name_of(alias) for alias in names}
            names += [
                cst.ImportAlias(_expression(module))
                for module in sorted(self.needed)
                if not any(path == module or path.startswith(module + ".") for path in have)
            ]
        self._edit(start, end, _code(statement.with_changes(names=_commas(names))), count=changes)
        return plain

    def _new_module(self, node: ast.Import, alias: ast.alias) -> str | None:
        resolved = resolve_path(alias.name)
        if resolved is None:
            return None
        target, rest = resolved
        if isinstance(target, Removed):
            self.left.append((node.lineno, f"import {target.old}: {target.hint}"))
            return None
        if alias.asname is None and not self._means_old_package(alias.name):
            self.left.append(
                (node.lineno, f"import {alias.name}: its root has another meaning here too; import it `as` something")
            )
            return None
        return target.path + rest

    def _import_from(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level or not (_is_old(module) or module == "sage"):
            return
        start, end = self._span(node)
        if node.names[0].name == "*":
            if module in MODULES:
                statement = _parse(self.text[start:end])
                self._edit(start, end, _code(statement.with_changes(module=_expression(MODULES[module]))))
            elif _is_old(module):
                self.left.append((node.lineno, f"from {module} import *: name what is imported"))
            return
        moves = [self._move(node, alias) for alias in node.names]
        if any(moves):
            self._move_names(node, start, end, moves)

    def _move(self, node: ast.ImportFrom, alias: ast.alias) -> tuple[str, str] | None:
        """(new module, or "" for a top-level package; new name), or None where the alias stays."""
        module = node.module or ""
        if module == "sage":
            return ("", "sagellm") if alias.name == "llm" else None
        target = resolve_name(module, alias.name)
        if isinstance(target, Target):
            if target.name is not None:
                return target.module, target.name
            parent, _, leaf = target.module.rpartition(".")
            return parent, leaf
        hint = target.hint if target is not None else "not a public name of any version"
        self.left.append((node.lineno, f"from {module} import {alias.name}: {hint}"))
        return None

    def _move_names(self, node: ast.ImportFrom, start: int, end: int, moves: Sequence[tuple[str, str] | None]) -> None:
        statement = _parse(self.text[start:end])
        assert isinstance(statement, cst.ImportFrom)
        assert not isinstance(statement.names, cst.ImportStar)
        count = sum(move is not None for move in moves)
        homes = {move[0] if move else None for move in moves}
        home = next(iter(homes))
        if len(homes) == 1 and home:
            names = [_renamed(alias, move[1]) for alias, move in zip(statement.names, moves, strict=True) if move]
            self._edit(start, end, _code(statement.with_changes(module=_expression(home), names=names)), count=count)
            return
        groups: dict[str, list[cst.ImportAlias]] = {}
        for alias, move in zip(statement.names, moves, strict=True):
            where, name = move if move is not None else (node.module or "", _name_of(alias))
            groups.setdefault(where, []).append(cst.ImportAlias(cst.Name(name), asname=_renamed(alias, name).asname))
        lines: list[str] = []
        for where, aliases in groups.items():
            if where:
                lines.append(_code(cst.ImportFrom(_expression(where), _commas(aliases))))
            else:
                lines += [_code(cst.Import([alias])) for alias in aliases]
        self._edit(start, end, self._joined(lines, start, end), count=count)

    def _joined(self, statements: list[str], start: int, end: int) -> str:
        """Several statements in the place of one: on lines of their own, after the comments that stood inside it."""
        line = self.text.rfind(b"\n", 0, start) + 1
        indent = self.text[line:start]
        following = re.match(rb"[ \t]*(;?)", self.text[end:])
        if indent.strip() or (following is not None and following.group(1)):
            return "; ".join(statements)
        newline = "\r\n" if b"\r\n" in self.text else "\n"
        comments = re.findall(r"#[^\r\n]*", self.text[start:end].decode("utf-8"))
        return (newline + indent.decode("utf-8")).join([*comments, *statements])

    # -- places ----------------------------------------------------------------------------------------------------------

    def _edit(self, start: int, end: int, new: str, *, count: int = 1) -> None:
        self.edits.append((start, end, new))
        self.changes += count

    def _offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def _span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, in source order, but only the outermost attribute of a dotted name and no text of an f-string."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.Attribute) and _dotted(node) is not None:
            continue
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.JoinedStr):
            children = [child for child in children if not isinstance(child, ast.Constant)]
        stack += reversed(children)


def _bound_name(node: ast.AST) -> str | None:
    """The name that a node other than an import binds, if any."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    return node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else None


def _is_old(path: str) -> bool:
    return any(path == root or path.startswith(root + ".") for root in OLD_ROOTS)


def _dotted(node: ast.expr) -> str | None:
    """``a.b.c`` as text, or None for anything but names and attributes."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _parse(statement: bytes) -> cst.BaseSmallStatement:
    line = cst.parse_statement(statement.decode("utf-8"))
    assert isinstance(line, cst.SimpleStatementLine)
    return line.body[0]


def _code(node: cst.BaseSmallStatement) -> str:
    return cst.Module([]).code_for_node(node)


def _expression(path: str) -> cst.Attribute | cst.Name:
    node: cst.Attribute | cst.Name = cst.Name(path.split(".", maxsplit=1)[0])
    for part in path.split(".")[1:]:
        node = cst.Attribute(node, cst.Name(part))
    return node


def _name_of(alias: cst.ImportAlias) -> str:
    return alias.evaluated_name


def _renamed(alias: cst.ImportAlias, name: str) -> cst.ImportAlias:
    """The alias under its new name, known to the rest of the file as before."""
    kept = alias.asname or (None if _name_of(alias) == name else cst.AsName(cst.Name(_name_of(alias))))
    return alias.with_changes(name=cst.Name(name), asname=kept)


def _commas(names: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Each alias once (two old modules may have one successor), with a comma between."""
    unique = {(_name_of(alias), alias.evaluated_alias): alias for alias in names}
    kept = list(unique.values())
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    spaced = [alias if isinstance(alias.comma, cst.Comma) else alias.with_changes(comma=comma) for alias in kept[:-1]]
    return [*spaced, kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)]
