"""Environments of the clients' own, cached outside the tree."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isagellm" / "clients"

Environment = Callable[[str, list[str]], Path]


def _folder(name: str, packages: list[str]) -> Path:
    key = hashlib.sha256(json.dumps([sys.version_info[:2], packages]).encode()).hexdigest()[:12]
    return CACHE / f"{name}-{key}"


@pytest.fixture(scope="session")
def python_with() -> Environment:
    """Return the interpreter of a cached virtual environment with some packages."""

    def make(name: str, packages: list[str]) -> Path:
        home = _folder(name, packages)
        python = home / "bin" / "python"
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, timeout=600)
            (home / "complete").touch()
        return python

    return make


@pytest.fixture(scope="session")
def node_with() -> Environment:
    """Return a cached folder with node_modules of some packages."""

    def make(name: str, packages: list[str]) -> Path:
        home = _folder(name, packages)
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            (home / "package.json").write_text('{"private": true}')
            command = ["npm", "install", "--silent", "--no-audit", *packages]
            subprocess.run(command, cwd=home, check=True, timeout=600)
            (home / "complete").touch()
        return home

    return make
