"""The llm command line with a model of its extra-openai-models file: usage llm_python.py ROOT_URL."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from runner import check, run

home = Path(tempfile.mkdtemp())
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: local\n  model_name: mock\n  api_base: {sys.argv[1]}/v1\n  api_key_name: none\n"
)
(home / "keys.json").write_text('{"none": "none"}')
llm = [str(Path(sys.executable).parent / "llm")]


def ask(*arguments: str) -> str:
    env = {**os.environ, "LLM_USER_PATH": str(home)}
    done = subprocess.run([*llm, *arguments], env=env, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


@check
def prompt_streams() -> None:
    assert ask("-m", "local", "hello").strip() == "Hello there, friend."


@check
def prompt_without_stream() -> None:
    assert ask("-m", "local", "--no-stream", "hello").strip() == "Hello there, friend."


@check
def conversation_goes_on() -> None:
    ask("-m", "local", "hello")
    assert ask("-c", "hello again").strip() == "Hello there, friend."


@check
def options_reach_the_model() -> None:
    assert ask("-m", "local", "-o", "max_tokens", "5", "hello").strip() == "Hello"


run()
