"""How fast `sage-llm migrate` is: a tree of standard-library code, half of it with the old imports.

    python benchmarks/migrate_tree.py [--files 2000]

Prints files a second for the check, for the rewrite, and for a second rewrite that finds nothing left, and fails if the second
changes anything, or if what was not an old name is no longer the same byte for byte.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

OLD = b"from sage.llm import UnifiedInferenceClient\nfrom sage.llm.gateway.server import create_app\n"
NEW = b"from sagellm import UnifiedInferenceClient\nfrom sagellm_gateway.server import create_app\n"


def readable(source: bytes) -> bool:
    """Whether this is Python that can be parsed (the library's tests hold some that is not), and old imports may go in front."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return b"from __future__" not in source


def plant(root: Path, count: int) -> dict[Path, bytes]:
    """Write `count` files into `root`, every second one with old imports in front; return what should be there in the end."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [source for path in sorted(library.rglob("*.py")) if readable(source := path.read_bytes())]
    wanted: dict[Path, bytes] = {}
    for number in range(count):
        body = sources[number % len(sources)]
        path = root / f"p{number // 100}" / f"m{number}.py"
        path.parent.mkdir(exist_ok=True)
        old = number % 2 == 0 and not body.startswith((b"#", b"\xef\xbb\xbf"))  # an encoding line must stay the first
        path.write_bytes(OLD + body if old else body)
        wanted[path] = NEW + body if old else body
    return wanted


def migrate(root: Path, *args: str) -> tuple[float, int, dict]:
    """Run the command; return its seconds, its status and its report."""
    started = time.perf_counter()
    command = [str(Path(sys.executable).with_name("sage-llm")), "migrate", str(root), "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return time.perf_counter() - started, done.returncode, json.loads(done.stdout)


def main() -> None:
    """Plant, check, migrate twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    count = parser.parse_args().files
    warnings.simplefilter("ignore", SyntaxWarning)  # of the library's own tests
    with tempfile.TemporaryDirectory() as folder:
        wanted = plant(Path(folder), count)
        for what, args, status in (("check", ["--check"], 1), ("migrate", [], 0), ("migrate again", [], 0)):
            seconds, got, _ = migrate(Path(folder), *args)
            assert got == status, f"{what} ended with {got}"
            print(f"{what:14} {count} files in {seconds:5.2f} s: {count / seconds:6,.0f} files a second")
        wrong = [path for path, content in wanted.items() if path.read_bytes() != content]
        assert not wrong, f"{len(wrong)} files differ from what was expected, the first is {wrong[0]}"


if __name__ == "__main__":
    main()
