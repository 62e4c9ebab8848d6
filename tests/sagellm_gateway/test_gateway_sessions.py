from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.server import create_app
from sagellm_gateway.testing import running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def test_session_lives_its_life(http: httpx2.Client) -> None:
    """Create, get, list, rename, clear, delete; a session that is gone is a 404 everywhere."""
    made = http.post("/sessions", json={"title": "one"}).json()
    path = f"/sessions/{made['id']}"
    assert http.get(path).json()["title"] == "one"
    assert made["id"] in [s["id"] for s in http.get("/sessions").json()["sessions"]]
    assert http.patch(f"{path}/title", json={"title": "two"}).status_code == 200
    assert http.get(path).json()["title"] == "two"
    assert http.post(f"{path}/clear").status_code == 200
    assert http.delete(path).status_code == 200
    for answer in (http.get(path), http.post(f"{path}/clear"), http.delete(path)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "session_not_found")
    assert http.post("/api/sessions").status_code == 201


def test_chat_in_a_session_remembers(http: httpx2.Client, manager: Any) -> None:
    """A chat with session_id sees the earlier turns and leaves its own, streamed or not."""
    session = http.post("/sessions").json()["id"]
    http.post("/v1/chat/completions", json={**CHAT, "session_id": session})
    http.post("/v1/chat/completions", json={**CHAT, "session_id": session, "stream": True})
    assert [m.role for m in manager.requests[-1].messages] == ["user", "assistant", "user"]
    kept = http.get(f"/sessions/{session}").json()
    assert [m["role"] for m in kept["messages"]] == ["user", "assistant", "user", "assistant"]
    assert kept["messages"][1]["content"] == "Hello, world"
    missing = http.post("/v1/chat/completions", json={**CHAT, "session_id": "sess_no"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "session_id")


def test_cleanup_takes_the_unused(http: httpx2.Client) -> None:
    """Cleanup with age zero removes every session and says how many."""
    http.post("/sessions")
    assert http.post("/sessions/cleanup", json={"max_age_minutes": 0}).json()["cleaned"] >= 1
    assert http.get("/sessions").json()["sessions"] == []


def test_sessions_survive_a_restart(manager: Any, tmp_path: Path) -> None:
    """Sessions are in the state file."""
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    with running(create_app(manager, config)) as server:
        made = httpx2.post(f"{server.url}/sessions", trust_env=False).json()
    with running(create_app(manager, config)) as server:
        assert httpx2.get(f"{server.url}/sessions/{made['id']}", trust_env=False).status_code == 200
