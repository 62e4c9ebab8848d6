"""Fixtures that every part's tests share: real models from the store, real servers on ports that the OS chose."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sagellm import store


def _model(name: str, variable: str) -> Path:
    if explicit := os.environ.get(variable):
        path = Path(explicit)
        if not path.exists():
            pytest.fail(f"{variable} is {explicit}, which does not exist: correct it or unset it")
        return path
    found = store.find(name)
    if found is None:
        pytest.fail(f"{name} is not in {store.home()}: run `make models` (or `sage-llm pull {name}`)")
    return found.path


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1, a GGUF file."""
    return _model("smollm2:135m", "SAGELLM_TEST_MODEL")


@pytest.fixture(scope="session")
def gemma_model_path() -> Path:
    """Gemma-3-270M Q4_K_M, a GGUF file."""
    return _model("gemma3:270m", "SAGELLM_TEST_GEMMA")


@pytest.fixture(scope="session")
def minilm_model_path() -> Path:
    """all-MiniLM-L6-v2, a directory with safetensors and tokenizer.json."""
    return _model("minilm:l6", "SAGELLM_TEST_MINILM")


_URL = re.compile(r"http://127\.0\.0\.1:\d+/v1")


class ServerProcess:
    """A `sage-llm serve` of our own, known by its pid. A thread drains its output, so that it never blocks on a full pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output: list[str] = []
        self.base_url = ""
        self._up = threading.Event()
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if not self.base_url and (match := _URL.search(line)):
                self.base_url = match.group()
                self._up.set()
        self._up.set()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def root_url(self) -> str:
        return self.base_url.removesuffix("/v1")

    def wait_until_up(self, timeout: float) -> None:
        if not (self._up.wait(timeout) and self.base_url):
            self.stop()
            pytest.fail("the server did not come up:\n" + "".join(self.output))

    def stop(self, timeout: float = 60.0) -> int:
        """Ask it to end as Ctrl-C does, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Start ``sage-llm serve ARGS`` (or another `command` that serves) on a free port and wait until it prints its URL; all are stopped at the end."""
    started: list[ServerProcess] = []
    state = tmp_path_factory.mktemp("state")  # no keys, sessions or logs of the person who runs the tests

    def start(
        *args: str, command: str = "serve", timeout: float = 110.0, env: dict[str, str] | None = None
    ) -> ServerProcess:
        process = subprocess.Popen(
            [sys.executable, "-m", "sagellm.cli.main", command, "--port", "0", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env={**os.environ, "XDG_STATE_HOME": str(state), **(env or {}), "PYTHONUNBUFFERED": "1"},
        )
        server = ServerProcess(process)
        started.append(server)
        server.wait_until_up(timeout)
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def mock_server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server over the simulated device: the real stack, no weights."""
    return start_server("--mock")


@pytest.fixture(scope="session")
def model_server(start_server: Callable[..., ServerProcess], default_model_path: Path) -> ServerProcess:
    """A server over the default model on the native backend."""
    return start_server(str(default_model_path), "--name", "smollm2:135m")
