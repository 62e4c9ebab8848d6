"""A server is killed and started again on its port."""

import os
import signal
from pathlib import Path

import httpx2


def chat(url: str) -> str:
    body = {
        "model": "mock",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
        "seed": 1,
    }
    reply = httpx2.post(f"{url}/chat/completions", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def engine_pid(output: list[str]) -> int:
    (line,) = [line for line in output if line.startswith("engine ")]
    words = line.replace(",", " ").replace("(", " ").split()
    return int(words[words.index("pid") + 1])


def test_next_server_takes_the_engine_over(start_server, tmp_path, port):
    """After kill -9 of the server its engine lives on, and the next server on that port answers by it at once with the same words."""
    env = {"XDG_STATE_HOME": str(tmp_path)}
    first = start_server("--mock", "--port", str(port), env=env)
    said, pid = chat(first.base_url), engine_pid(first.output)
    os.kill(first.pid, signal.SIGKILL)
    first.process.wait()
    second = start_server("--mock", "--port", str(port), env=env)
    assert engine_pid(second.output) == pid
    assert chat(second.base_url) == said
    assert second.stop() == 0
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
