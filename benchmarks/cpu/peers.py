"""The peers: what to install where. Each has a virtual environment of its own below the user's cache, made on first use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = {"llama.cpp": "with_llamacpp.py", "openvino": "with_openvino.py"}
FORMATS = {"llama.cpp": ("q4", "q8", "bf16"), "openvino": ("q4", "q8")}  # what each reads from a GGUF file
REQUIREMENTS = {
    "llama.cpp": ["xllamacpp==2026.10.11549"],
    "openvino": ["openvino-genai==2026.4.1.0", "numpy"],
}


def home() -> Path:
    """Where the environments are."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isagellm" / "bench-peers"


def python_of(peer: str) -> Path:
    """The peer's interpreter."""
    return home() / peer / "bin" / "python"


def install(peer: str) -> None:
    """Make the peer's environment, unless it is there."""
    done = home() / peer / ".installed"
    if done.exists() and done.read_text().split() == REQUIREMENTS[peer]:
        return
    subprocess.run([sys.executable, "-m", "venv", str(home() / peer)], check=True)
    subprocess.run([str(python_of(peer)), "-m", "pip", "install", "-q", *REQUIREMENTS[peer]], check=True)
    done.write_text(" ".join(REQUIREMENTS[peer]))
