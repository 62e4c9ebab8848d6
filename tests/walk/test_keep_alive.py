"""``sage-llm serve --keep-alive``: an idle engine gives its memory back and answers again when it is asked."""

import time
from collections.abc import Iterator

import httpx2
import pytest

BODY = {
    "model": "mock",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 8,
    "temperature": 0,
    "seed": 1,
}


@pytest.fixture
def client(start_server, tmp_path) -> Iterator[httpx2.Client]:
    server = start_server("--mock", "--keep-alive", "0.3", env={"XDG_STATE_HOME": str(tmp_path)})
    with httpx2.Client(base_url=server.root_url, timeout=30) as client:
        yield client
    log = (tmp_path / "isagellm" / "logs" / "mock.log").read_text()
    server.stop()
    assert "unloaded mock after 0.3 s without work" in log
    assert "loading mock again" in log


def test_idle_engine_answers_again(client):
    """After an idle time the model is unloaded; the next request loads it and gets the very same answer."""
    first = client.post("/v1/chat/completions", json=BODY).json()
    time.sleep(1.0)
    assert client.get("/ready").status_code == 200
    again = client.post("/v1/chat/completions", json=BODY).json()
    assert again["choices"] == first["choices"]
