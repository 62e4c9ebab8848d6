"""Record terminal sessions as SVG: real commands, real output. Run: python docs/pictures/make_recordings.py (needs the default model)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
RECORDINGS = {
    "run": [
        'sage-llm run smollm2:135m "What is the capital of France?" --verbose',
        'sage-llm run smollm2:135m "What are the primary colours?" --seed 1 --max-tokens 60',
    ],
    "models": ["sage-llm pull --catalog", "sage-llm list", "sage-llm show smollm2:135m"],
    "doctor": ["sage-llm doctor --offline", "sage-llm explain port-in-use"],
    "demo": ["sage-llm demo --workload year1 --mock -o metrics.json"],
}
COLUMNS, LINE, TOP = 110, 18, 44
STYLES = {"ok": "#16a34a", "warn": "#d97706", "FAIL": "#dc2626", "MISSED": "#dc2626"}


def record(command: str, folder: Path) -> list[str]:
    """Run `command` and return its lines, paths of this machine replaced."""
    words = [sys.executable, "-m", "sagellm", *shlex.split(command)[1:]]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env={**os.environ, "COLUMNS": str(COLUMNS)},
    )
    text = (done.stdout + done.stderr).replace(str(Path.home()), "~").replace(sys.prefix, ".venv")
    return re.sub(r"(/[\w.-]+){3,}/\.venv", ".venv", text).rstrip().splitlines()


def svg(sessions: list[tuple[str, list[str]]]) -> str:
    """Return the picture of a terminal."""
    lines: list[tuple[str, str]] = []
    for command, output in sessions:
        lines.append(("command", f"$ {command}"))
        lines += [("output", part) for line in output for part in wrapped(line)]
        lines.append(("output", ""))
    width, height = 9 * COLUMNS, TOP + LINE * len(lines) + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="ui-monospace, Menlo, Consolas, monospace" '
        'font-size="13">',
        f'<rect width="{width}" height="{height}" rx="10" fill="#111827"/>',
        '<circle cx="20" cy="18" r="6" fill="#ef4444"/><circle cx="40" cy="18" r="6" fill="#f59e0b"/><circle cx="60" cy="18" r="6" fill="#22c55e"/>',
    ]
    for k, (kind, line) in enumerate(lines):
        first = line.split(" ", 1)[0]
        fill = "#93c5fd" if kind == "command" else STYLES.get(first, "#e5e7eb")
        out.append(f'<text x="16" y="{TOP + LINE * k}" fill="{fill}" xml:space="preserve">{escape(line)}</text>')
    return "\n".join([*out, "</svg>", ""])


def wrapped(line: str) -> list[str]:
    """Return `line` as a terminal shows it: broken where its columns end."""
    return [line[k : k + COLUMNS] for k in range(0, len(line), COLUMNS)] or [""]


def main() -> None:
    """Write one SVG for each recording (or those named on the command line)."""
    import tempfile

    for name in sys.argv[1:] or RECORDINGS:
        with tempfile.TemporaryDirectory() as folder:
            sessions = [(command, record(command, Path(folder))) for command in RECORDINGS[name]]
        (HERE / f"{name}.svg").write_text(svg(sessions), encoding="utf-8")


if __name__ == "__main__":
    main()
