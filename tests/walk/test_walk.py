"""One request end to end: `sage-llm serve` as a user starts it, the official client, a killed engine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import psutil
import pytest

QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def client_of(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=60)


def engine_pids(server: Any) -> list[int]:
    return [
        child.pid
        for child in psutil.Process(server.pid).children(recursive=True)
        if "sagellm_core.server" in " ".join(child.cmdline())
    ]


def test_the_official_client_gets_the_same_answer_streamed_and_not(mock_server: Any) -> None:
    """A greedy answer over the mock is the same whole and in pieces, and the usage adds up."""
    client = client_of(mock_server)
    whole = client.chat.completions.create(model="mock", messages=QUESTION, max_tokens=24, temperature=0)
    pieces = list(
        client.chat.completions.create(
            model="mock",
            messages=QUESTION,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.model
def test_the_default_model_answers_sensibly_over_http(model_server: Any) -> None:
    """SmolLM2-135M behind the whole stack knows the capital of France, streamed and not."""
    client = client_of(model_server)
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=16, temperature=0)
    assert "Paris" in (whole.choices[0].message.content or "")
    stream = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=16, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole.choices[0].message.content


def test_a_killed_engine_is_a_503_and_comes_back(start_server: Callable[..., Any]) -> None:
    """After kill -9 of the engine the gateway answers 503 in the OpenAI shape, starts it again and serves again."""
    server = start_server("--mock")
    before = engine_pids(server)
    assert len(before) == 1
    os.kill(before[0], signal.SIGKILL)
    body = {"model": "mock", "messages": QUESTION, "max_tokens": 4, "temperature": 0}
    saw_unavailable = False
    deadline = time.monotonic() + 100
    with httpx2.Client(timeout=30) as http:
        while time.monotonic() < deadline:
            reply = http.post(f"{server.base_url}/chat/completions", json=body)
            if reply.status_code == 200 and engine_pids(server) not in ([], before):
                break
            if reply.status_code == 503:
                saw_unavailable = True
                error = reply.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert isinstance(error["code"], str)
        else:
            pytest.fail("the engine did not come back within 100 s")
        assert saw_unavailable or reply.status_code == 200
        assert http.get(f"{server.root_url}/ready").status_code == 200
    assert server.process.poll() is None


def test_the_server_ends_cleanly_and_takes_its_engines_along(start_server: Callable[..., Any]) -> None:
    """Ctrl-C ends the server with status 0 and no engine is left behind."""
    server = start_server("--mock", "--engines", "2")
    pids = engine_pids(server)
    assert len(pids) == 2
    assert server.stop() == 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(10)
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.model
def test_the_last_word_of_a_server_is_stopped(start_server: Callable[..., Any], default_model_path: Any) -> None:
    """A server that has served a real model ends without any complaint of the interpreter or of an extension."""
    server = start_server(str(default_model_path), "--name", "m")
    body = {"model": "m", "messages": QUESTION, "max_tokens": 4}
    assert httpx2.post(f"{server.base_url}/chat/completions", json=body, timeout=60).status_code == 200
    assert server.stop() == 0
    assert server.output[-1] == "stopped\n"


def run_cli(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sagellm", *args],
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.model
def test_run_answers_one_prompt_and_reports_what_it_took(default_model_path: Any) -> None:
    """`sage-llm run MODEL PROMPT -v` prints the answer on stdout and the measured times and memory on stderr."""
    done = run_cli(
        "run", str(default_model_path), QUESTION[0]["content"], "--temperature", "0", "-v", "--max-tokens", "16"
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "command to first token" in done.stderr
    assert "peak resident memory" in done.stderr


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["run", "./nonesuch.gguf", "hi"], 1, ["no such file", "check the path"]),
        (["run", "nonesuch:7b", "hi"], 1, ["not on this machine"]),
        (["run", "--mock", ""], 1, ["the prompt is empty"]),
        (["serve", "--mock", "--policy", "nonesuch", "--port", "0"], 1, ["nonesuch"]),
        (["serve", "--mock", "--kv-size", "many"], 1, ["--kv-size", "512MB"]),
        (["nonesuch"], 2, ["no command"]),
        (["run", "--nonesuch"], 2, ["nonesuch"]),
    ],
)
def test_bad_usage_is_one_clear_line(args: list[str], status: int, words: list[str]) -> None:
    """Wrong input ends with a non-zero status and one message that says what to do, without a traceback."""
    done = run_cli(*args)
    assert done.returncode == status, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_broken_model_file_is_one_clear_line(tmp_path: Any, content: bytes) -> None:
    """An empty, truncated, foreign or corrupt file is refused by run and by serve without a traceback."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    for args in (["run", str(path), "hi"], ["serve", str(path), "--port", "0"]):
        done = run_cli(*args)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "error:" in done.stderr


def test_a_port_in_use_is_said_with_the_cure(mock_server: Any) -> None:
    """A second server on the same port ends at once and names the flag that helps."""
    port = mock_server.root_url.rpartition(":")[2]
    done = run_cli("serve", "--mock", "--port", port)
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert "--port" in done.stderr
