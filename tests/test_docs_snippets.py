"""Every snippet in the documentation runs: Python against a real server, shell lines as far as they are commands of ours."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sagellm.cli.main import main

ROOT = Path(__file__).parent.parent
# The page of the commands is compared as a whole, below.
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "cli.md")]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def snippets(language: str) -> list[Any]:
    """Return (page, code) of every fenced block of `language`, except those that the line before marks as not to be run."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for k, match in enumerate(FENCE.finditer(text)):
            marked = text[: match.start()].rstrip().endswith("<!-- not run -->")
            if match[1] == language and not marked:
                found.append(pytest.param(match[2], id=f"{page.name}-{k}"))
    return found


@pytest.fixture(scope="session")
def server_url(model_server: Any) -> str:
    url: str = model_server.base_url
    return url


def run_python(path_or_code: list[str], url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *path_or_code],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "SAGE_UNIFIED_BASE_URL": url},
        check=False,
    )


@pytest.mark.model
@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippets_run(code: str, server_url: str) -> None:
    """A Python block runs to its end against a real server, and prints where it says so."""
    done = run_python(["-c", code.replace("http://127.0.0.1:8889/v1", server_url)], server_url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "print(" not in code


@pytest.mark.model
@pytest.mark.parametrize("example", ["openai_chat.py", "client_chat.py", "embedded.py"])
def test_examples_run(example: str, server_url: str) -> None:
    """An example runs to its end and answers with the capital."""
    done = run_python([str(ROOT / "examples" / example)], server_url)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def curl_lines() -> list[Any]:
    found = []
    for block in snippets("sh"):
        joined = block.values[0].replace("\\\n", " ")
        found += [
            pytest.param(line, id=f"{block.id}-{k}")
            for k, line in enumerate(joined.splitlines())
            if line.startswith("curl ")
        ]
    return found


@pytest.mark.model
@pytest.mark.parametrize("line", curl_lines())
def test_curl_lines_answer(line: str, server_url: str) -> None:
    """A curl line of the docs gets JSON without an error from a real server."""
    line = line.replace("http://127.0.0.1:8889", server_url.removesuffix("/v1"))
    done = subprocess.run([*shlex.split(line), "-sS", "-N"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("data:"):
        assert "data: [DONE]" in done.stdout
    else:
        assert "error" not in json.loads(done.stdout)


def command_lines() -> list[Any]:
    found = []
    for block in snippets("sh"):
        for k, line in enumerate(block.values[0].replace("\\\n", " ").splitlines()):
            command = re.sub(r"^(\w+=\S+ )+", "", line)
            if command.startswith("sage-llm "):
                found.append(pytest.param(command, id=f"{block.id}-{k}"))
    return found


@pytest.mark.parametrize("line", command_lines())
def test_commands_of_the_docs_exist_with_those_options(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every ``sage-llm`` line of the docs names a command that exists and options that its help lists."""
    words = shlex.split(line, comments=True)[1:]
    group = {"bench", "config", "engine", "keys", "protocol"}
    assert main([*(words[:2] if words[0] in group else words[:1]), "--help"]) == 0
    help_text = capsys.readouterr().out
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in help_text, word


def test_the_page_of_the_commands_is_what_the_code_says() -> None:
    """docs/cli.md is what docs/make_cli_page.py writes."""
    spec = importlib.util.spec_from_file_location("make_cli_page", ROOT / "docs" / "make_cli_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module.page()


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "docs" / "design" / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page points to a file of the tree."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
