"""`sage-llm migrate` and `sage-llm arch`: arguments, reports and exit codes."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sagellm.migrate.tree import FileReport, find_files, is_dirty, migrate_tree

__all__ = ["arch", "arch_parser", "migrate", "migrate_parser"]


def migrate_parser() -> argparse.ArgumentParser:
    """Return the parser of ``sage-llm migrate``."""
    parser = argparse.ArgumentParser(
        prog="sage-llm migrate",
        description="Rewrite a code base from isage-llm-core / isage-llm-gateway (sage.llm) to isagellm. In a git tree with "
        "uncommitted changes nothing is written unless --write is given.",
        epilog="exit codes: 0 nothing is left; 1 something is left (with --check also: something would change); 2 wrong usage",
    )
    parser.add_argument("path", type=Path, help="a folder or a file")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing; exit 1 if anything is left (for CI)")
    mode.add_argument("--diff", action="store_true", help="change nothing; print a unified diff")
    mode.add_argument("--write", action="store_true", help="write even if the git tree is dirty")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes (default: one for each core)")
    return parser


def arch_parser() -> argparse.ArgumentParser:
    """Return the parser of ``sage-llm arch``."""
    from sagellm.migrate.arch import PROFILES

    parser = argparse.ArgumentParser(
        prog="sage-llm arch",
        description="Check a code base: no import of a deprecated path, and the layer rules of a profile or a TOML table.",
        epilog="exit codes: 0 clean; 1 findings; 2 wrong usage",
    )
    parser.add_argument("path", type=Path, help="a folder or a file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--profile", choices=sorted(PROFILES), default="consumer", help="ready-made rules (default: consumer)"
    )
    source.add_argument("--rules", type=Path, metavar="FILE", help="a TOML file with an [arch] table")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--format", choices=("text", "json", "sarif"), default="text", help="of the findings (default: text)"
    )
    output.add_argument("--json", action="store_const", const="json", dest="format", help="print the findings as JSON")
    return parser


def migrate(argv: Sequence[str]) -> int:
    """Run ``sage-llm migrate``; returns the exit code: 0 clean, 1 something is left, 2 wrong usage."""
    parser = migrate_parser()
    args = parser.parse_args(argv)
    if not args.path.exists():
        parser.error(f"{args.path} does not exist: give a folder or a file")
    try:
        import libcst  # noqa: F401
    except ModuleNotFoundError:
        parser.error("needs libcst: pip install 'isagellm[migrate]'")
    dry = args.check or args.diff
    held_back = not dry and not args.write and is_dirty(args.path)
    started = time.perf_counter()
    reports = list(_with_progress(migrate_tree(args.path, write=not (dry or held_back), jobs=args.jobs), args.path))
    seconds = time.perf_counter() - started
    reports.sort(key=lambda r: r.path)
    if args.json:
        _print(json.dumps(_as_json(reports, seconds, written=not (dry or held_back)), indent=2))
    else:
        if args.diff:
            _print_diff(reports)
        _print_report(reports, seconds, dry=dry or held_back)
        if held_back:
            _print("nothing was written: the git tree has uncommitted changes. Commit or stash them, or pass --write.")
    left = any(r.left or r.unparsed for r in reports)
    would_change = (args.check or held_back) and any(r.changes for r in reports)
    return 1 if left or would_change else 0


def arch(argv: Sequence[str]) -> int:
    """Run ``sage-llm arch``; returns the exit code: 0 clean, 1 findings, 2 wrong usage."""
    from sagellm.migrate.arch import PROFILES, check_tree, load_rules

    parser = arch_parser()
    args = parser.parse_args(argv)
    if not args.path.exists():
        parser.error(f"{args.path} does not exist: give a folder or a file")
    try:
        rules = load_rules(args.rules) if args.rules else PROFILES[args.profile]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    findings = list(check_tree(args.path, rules))
    if args.format == "text":
        for f in findings:
            _print(f"{f.path}:{f.line}: {f.rule}: {f.message}")
        _print(f"{len(findings)} finding{'' if len(findings) == 1 else 's'}")
    elif args.format == "json":
        _print(
            json.dumps(
                [{"path": f.path, "line": f.line, "rule": f.rule, "message": f.message} for f in findings], indent=2
            )
        )
    else:
        _print(json.dumps(_sarif(findings), indent=2))
    return 1 if findings else 0


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _with_progress(reports: Iterable[FileReport], path: Path) -> Iterable[FileReport]:
    if not sys.stderr.isatty():
        yield from reports
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(
        reports, "migrating", total=sum(1 for _ in find_files(path)), console=Console(stderr=True), transient=True
    )


def _print_diff(reports: Iterable[FileReport]) -> None:
    for r in reports:
        if r.before != r.after:
            before, after = (x.decode("utf-8", "replace").splitlines(keepends=True) for x in (r.before, r.after))
            sys.stdout.writelines(
                difflib.unified_diff(before, after, f"a/{r.path.lstrip('/')}", f"b/{r.path.lstrip('/')}")
            )


def _print_report(reports: Sequence[FileReport], seconds: float, *, dry: bool) -> None:
    verb = "would change" if dry else "changed"
    for r in reports:
        if r.changes:
            _print(f"{r.path}: {verb} {r.changes}")
        for line, what in r.left:
            _print(f"{r.path}:{line}: LEFT {what}")
        if r.unparsed:
            _print(f"{r.path}: NOT TOUCHED, {r.unparsed}")
        for line, what in r.notes:
            _print(f"{r.path}:{line}: note: {what}")
    changed = sum(1 for r in reports if r.changes)
    _print(
        f"{len(reports)} files read in {seconds:.1f} s ({len(reports) / max(seconds, 1e-9):.0f} a second): {changed} {verb}, "
        f"{sum(len(r.left) for r in reports)} names left, {sum(1 for r in reports if r.unparsed)} files not touched"
    )


def _as_json(reports: Sequence[FileReport], seconds: float, *, written: bool) -> dict[str, Any]:
    return {
        "files": len(reports),
        "seconds": round(seconds, 3),
        "written": written,
        "reports": [
            {
                "path": r.path,
                "changes": r.changes,
                "left": [{"line": line, "text": text} for line, text in r.left],
                "notes": [{"line": line, "text": text} for line, text in r.notes],
                "unparsed": r.unparsed,
            }
            for r in reports
            if r.changes or r.left or r.notes or r.unparsed
        ],
    }


def _sarif(findings: Sequence[Any]) -> dict[str, Any]:
    """SARIF 2.1.0, for code-scanning views."""
    rules = sorted({f.rule for f in findings})
    return {
        "version": "2.1.0",
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "runs": [
            {
                "tool": {"driver": {"name": "sage-llm arch", "rules": [{"id": rule} for rule in rules]}},
                "results": [
                    {
                        "ruleId": f.rule,
                        "level": "error",
                        "message": {"text": f.message},
                        "locations": [
                            {
                                "physicalLocation": {
                                    "artifactLocation": {"uri": Path(f.path).as_posix()},
                                    "region": {"startLine": f.line},
                                }
                            }
                        ],
                    }
                    for f in findings
                ],
            }
        ],
    }
