"""The official packages against `sage-llm serve --mock --script`: each in an environment of its own, cached outside the tree."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent

# Name -> (script, packages, least number of checks).
PYTHON = {
    "openai-2": ("openai_python.py", ["openai>=2,<3"], 46),
    "openai-3": ("openai_python.py", ["openai>=3,<4"], 46),
    "anthropic": ("anthropic_python.py", ["anthropic"], 17),
    "ollama": ("ollama_python.py", ["ollama"], 17),
    "llm": ("llm_python.py", ["llm"], 4),
}
NODE = {
    "openai-node": ("openai_node.mjs", ["openai"], 22),
    "anthropic-node": ("anthropic_node.mjs", ["@anthropic-ai/sdk"], 12),
    "ollama-node": ("ollama_node.mjs", ["ollama"], 11),
}


@pytest.fixture(scope="module")
def root_url(start_server: Callable[..., Any]) -> str:
    server = start_server("--mock", "--mock-scale", "0", "--script", str(HERE / "script.json"))
    url: str = server.root_url
    return url


def judge(output: str, least: int) -> None:
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    failed = [f"{f['check']}:\n{f['error']}" for f in found if not f["ok"]]
    assert not failed, "\n".join(failed)
    assert len(found) >= least, output


@pytest.mark.parametrize("name", PYTHON)
def test_python_package(name: str, root_url: str, python_with: Callable[[str, list[str]], Path]) -> None:
    """Every check of the package passes against the real stack."""
    script, packages, least = PYTHON[name]
    done = subprocess.run(
        [python_with(name, packages), HERE / "checks" / script, root_url],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    judge(done.stdout, least)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
@pytest.mark.parametrize("name", NODE)
def test_node_package(name: str, root_url: str, node_with: Callable[[str, list[str]], Path]) -> None:
    """Every check of the package passes against the real stack."""
    script, packages, least = NODE[name]
    home = node_with(name, packages)
    for file in ("runner.mjs", script):
        shutil.copy(HERE / "checks" / file, home / file)
    done = subprocess.run(
        ["node", script, root_url], cwd=home, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    judge(done.stdout, least)
