"""Walk a code base, rewrite each file that names something old, and report."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagellm.migrate.dependencies import is_dependency_file, rename_requirements

__all__ = ["FileReport", "find_files", "is_dirty", "migrate_file", "migrate_tree"]

_MAGIC = "#\u2063"
"""Marks a notebook line that is not Python: a comment with an invisible separator, which no source has by accident."""

_SKIP = {
    ".git",
    ".hg",
    ".venv",
    "venv",
    "node_modules",
    "__pycache__",
    ".tox",
    ".nox",
    ".mypy_cache",
    "build",
    "dist",
    ".eggs",
}


@dataclass(slots=True)
class FileReport:
    """What happened, or would happen, to one file.

    Attributes:
        path: as found below the root that was given.
        changes: names rewritten.
        left: (line, text) that a person has to look at.
        notes: (line, text) of old names inside other text.
        unparsed: why the file was not touched although it names something old; None if it was understood.
        before, after: the contents, equal when nothing changed.
    """

    path: str
    changes: int = 0
    left: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    unparsed: str | None = None
    before: bytes = b""
    after: bytes = b""


def find_files(root: Path) -> Iterator[Path]:
    """Yield the Python files, notebooks and dependency files below `root` (or `root` itself); no links, no environments."""
    if root.is_file():
        yield root
        return
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in _SKIP and not (Path(folder, n) / "pyvenv.cfg").exists())
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_symlink():
                continue
            if name.endswith((".py", ".pyi", ".ipynb")) or is_dependency_file(path.as_posix()):
                yield path


def is_dirty(root: Path) -> bool:
    """Whether `root` lies in a git work tree with uncommitted changes."""
    folder = root if root.is_dir() else root.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],  # noqa: S607
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def migrate_tree(root: Path, *, write: bool, jobs: int = 0) -> Iterator[FileReport]:
    """Rewrite every file below `root`; yield a report for each file read, in no promised order.

    Args:
        root: a folder or a file.
        write: put the new contents in place (atomically, a file at a time); else only report.
        jobs: processes; 0 is one for each core.
    """
    files = list(find_files(root))
    jobs = jobs or os.cpu_count() or 1
    if jobs == 1 or len(files) < 64:
        for path in files:
            yield migrate_file(path, write=write)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(
            _migrate_one, ((path, write) for path in files), chunksize=max(1, min(32, len(files) // (jobs * 4)))
        )


def _migrate_one(job: tuple[Path, bool]) -> FileReport:
    path, write = job
    report = migrate_file(path, write=write)
    if report.before == report.after:
        report.before = report.after = b""
    return report


def migrate_file(path: Path, *, write: bool) -> FileReport:
    """Rewrite one file; a file that cannot be read or parsed is left alone, and the report says why."""
    from sagellm.migrate.python_code import mentions_old_names

    report = FileReport(str(path))
    try:
        source = path.read_bytes()
    except OSError as error:
        report.unparsed = f"cannot be read: {error.strerror}"
        return report
    report.before = report.after = source
    if not mentions_old_names(source):
        return report
    if path.suffix in (".py", ".pyi"):
        _python(report)
    elif path.suffix == ".ipynb":
        _notebook(report)
    if is_dependency_file(path.as_posix()):
        _dependencies(path, report)
    if write and report.after != source:
        _replace(path, report.after)
    return report


def _python(report: FileReport) -> None:
    from sagellm.migrate.python_code import rewrite_python

    try:
        result = rewrite_python(report.after)
    except SyntaxError as error:
        report.unparsed = f"line {error.lineno or 1}: not Python 3 ({error.msg})"
        return
    except UnicodeDecodeError as error:
        report.unparsed = f"is not {error.encoding}, the encoding that it declares (byte {error.start})"
        return
    except ValueError as error:
        report.unparsed = f"is not Python ({error})"
        return
    report.after = result.source
    report.changes += result.changes
    report.left += result.left
    report.notes += result.notes


def _dependencies(path: Path, report: FileReport) -> None:
    try:
        text = report.after.decode("utf-8")
    except UnicodeDecodeError as error:
        report.unparsed = f"is not UTF-8 ({error.reason} at byte {error.start})"
        return
    new, count = rename_requirements(text, path.as_posix())
    if count and path.suffix == ".toml" and not (_is_toml(text) and _is_toml(new)):
        report.unparsed = "is not valid TOML"
        return
    report.after = new.encode("utf-8")
    report.changes += count


def _is_toml(text: str) -> bool:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError:
        return False
    return True


def _notebook(report: FileReport) -> None:
    """Rewrite the code cells; only a notebook whose JSON we can write back byte for byte is touched."""
    try:
        text = report.before.decode("utf-8")
        notebook = json.loads(text)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        report.unparsed = "is not a Jupyter notebook (nbformat 4)"
        return
    style = next((s for s in _styles(text) if _dump(notebook, s) == text), None)
    if style is None:
        report.unparsed = "its JSON layout is unusual: open and save it with Jupyter, then run this again"
        return
    for number, cell in enumerate(cells, 1):
        _cell(cell, number, report)
    if report.changes:
        report.after = _dump(notebook, style).encode("utf-8")


def _cell(cell: dict[str, Any], number: int, report: FileReport) -> None:
    from sagellm.migrate.python_code import rewrite_python

    source = cell["source"]
    text = source if isinstance(source, str) else "".join(source)
    # Magics and shell lines are not Python: they pass through as comments.
    masked = "".join(
        _MAGIC + line if line.lstrip().startswith(("%", "!", "?")) else line for line in text.splitlines(keepends=True)
    )
    try:
        result = rewrite_python(masked.encode("utf-8"))
    except SyntaxError as error:
        report.left.append((number, f"code cell {number} is not Python 3 ({error.msg})"))
        return
    report.left += [(number, f"code cell {number}: {what}") for _, what in result.left]
    report.notes += [(number, f"code cell {number}: {what}") for _, what in result.notes]
    if result.changes:
        report.changes += result.changes
        new = result.source.decode("utf-8").replace(_MAGIC, "")
        cell["source"] = new if isinstance(source, str) else new.splitlines(keepends=True)


def _styles(text: str) -> Iterator[tuple[int | str | None, bool, str]]:
    end = "\n" if text.endswith("\n") else ""
    for indent in (1, 2, 4, "\t", None):
        for ascii_only in (False, True):
            yield indent, ascii_only, end


def _dump(notebook: Any, style: tuple[int | str | None, bool, str]) -> str:
    indent, ascii_only, end = style
    return json.dumps(notebook, indent=indent, ensure_ascii=ascii_only) + end


def _replace(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    temporary = Path(file.name)
    temporary.chmod(mode)
    temporary.replace(path)
