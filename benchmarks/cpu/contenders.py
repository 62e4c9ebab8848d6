"""The contenders as processes: started, asked, weighed, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, NamedTuple

import peers

HERE = Path(__file__).parent


class LeftOut(Exception):
    """A contender that cannot do what is measured, with its own reason."""


class LineProcess:
    """A contender that speaks one JSON object a line.

    ``{"ready": true, ...}`` when loaded, then for each command (``{"op": "one", "prompt": ids, "n": tokens}``,
    ``{"op": "many", "prompts": ...}``) one answer with ``prefill_s``, ``decode_s``, ``tokens`` (and ``ttft_s``).
    """

    def __init__(self, argv: list[str], options: dict) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [*argv, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ready = self._read()

    @property
    def url(self) -> str:
        """Where it serves HTTP, if it does."""
        return self.ready.get("url", "")

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self.process.pid

    def ask(self, **command: object) -> dict:
        """Send one command, return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise LeftOut(f"it ended with {self.process.wait()}: {_last_words(self.errors)}")


class Server:
    """A server as a user starts it; ready when `path` answers 200."""

    def __init__(
        self, argv: list[str], port: int, path: str, *, timeout_s: float, env: dict[str, str] | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the server)
        started = time.perf_counter()
        self.process = subprocess.Popen(
            argv, stdout=self.log, stderr=self.log, env={**os.environ, **(env or {})}, start_new_session=True
        )
        while not self._answers(path):
            if self.process.poll() is not None:
                raise LeftOut(f"it ended with {self.process.returncode}: {_last_words(self.log)}")
            if time.perf_counter() - started > timeout_s:
                self.close()
                raise LeftOut(f"it was not ready within {timeout_s:g} s: {_last_words(self.log)}")
            time.sleep(0.005)
        self.ready_s = time.perf_counter() - started

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self.process.pid

    def pause(self, paused: bool) -> None:
        """Stop all its processes, or let them go on: a peer that is slow to start stays, and costs the others nothing."""
        os.killpg(self.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def close(self) -> None:
        """Stop it as a user does."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def _last_words(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


def our_server(model: str, streams: int, threads: int, ctx: int) -> Server:
    """Start ``sage-llm serve``."""
    port = free_port()
    program = Path(sys.executable).with_name("sage-llm")
    argv = [
        "serve",
        f"bench={model}",
        "--port",
        port,
        "--parallel",
        max(2, streams),
        "--ctx",
        ctx,
        "--threads",
        threads,
    ]
    return Server([str(program), *map(str, argv)], port, "/ready", timeout_s=120)


def our_session(options: dict) -> LineProcess:
    """Start our engine in process."""
    return LineProcess([sys.executable, str(HERE / "with_isagellm.py")], options)


def peer_session(name: str, options: dict) -> LineProcess:
    """Start a peer in its own environment.

    Raises:
        LeftOut: it cannot run the model.
    """
    return LineProcess([str(peers.python_of(name)), str(HERE / peers.SCRIPTS[name])], options)


def vllm_server(folder: str, threads: int, ctx: int) -> Server:
    """Start vLLM's server over a folder written by huggingface.py.

    Raises:
        LeftOut: it does not come up.
    """
    port = free_port()
    argv = ["-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--served-model-name", "bench", "--dtype", "bfloat16", "--max-model-len", str(ctx), "--max-num-seqs", "32"]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Server([str(peers.python_of("vllm")), *argv], port, "/health", timeout_s=600, env=env)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Held(NamedTuple):
    """MB of a family of processes: the sum of their RSS, and the same with shared pages counted once (PSS)."""

    rss: float
    pss: float


def memory_of(pid: int) -> Held:
    """Return what a process and all below it hold now."""
    rss = pss = 0
    for each in _family(pid):
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        rss += _kilobytes(rollup, "Rss:")
        pss += _kilobytes(rollup, "Pss:")
    return Held(rss * 1.024e-3, pss * 1.024e-3)


def _family(pid: int) -> list[int]:
    out = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            out += _family(int(child))
    return out


def _kilobytes(rollup: str, key: str) -> int:
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(key))
