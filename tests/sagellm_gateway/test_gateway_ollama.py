from __future__ import annotations

import json
from typing import Any

import httpx2

from sagellm_protocol.generation import ChoiceDelta, ToolCallDelta

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_chat_streams_lines_unless_told_not_to(http: httpx2.Client) -> None:
    """Lines come by default, the last has done and counts; stream false gives one object."""
    answer = http.post("/api/chat", json=CHAT)
    assert answer.headers["content-type"] == "application/x-ndjson"
    got = lines(answer.text)
    assert "".join(g["message"]["content"] for g in got) == "Hello, world"
    assert [g["done"] for g in got] == [False] * 3 + [True]
    assert (got[-1]["done_reason"], got[-1]["eval_count"], got[-1]["prompt_eval_count"]) == ("stop", 3, 7)
    assert got[-1]["total_duration"] > 0
    plain = http.post("/api/chat", json={**CHAT, "stream": False}).json()
    assert (plain["message"]["content"], plain["done"]) == ("Hello, world", True)


def test_generate_templates_unless_raw(http: httpx2.Client, manager: Any) -> None:
    """A prompt is a user turn with the system text before it; a raw one goes in as it is."""
    http.post("/api/generate", json={"model": "tiny:latest", "prompt": "Hi", "system": "s", "stream": False})
    assert [m.role for m in manager.requests[-1].messages] == ["system", "user"]
    got = http.post("/api/generate", json={"model": "tiny", "prompt": "Hi", "raw": True, "stream": False}).json()
    assert manager.requests[-1].prompt == "Hi"
    assert got["response"] == "Hello, world"


def test_options_become_sampling_and_unknown_ones_are_named(http: httpx2.Client, manager: Any) -> None:
    """Known options set the sampling; the rest is named in the header; bad values are refused."""
    options = {"temperature": 0, "num_predict": 5, "stop": ["x"], "repeat_penalty": 1.1, "num_ctx": 2048}
    answer = http.post("/api/chat", json={**CHAT, "options": options})
    assert answer.headers["x-sagellm-ignored-params"] == "options.num_ctx"
    sampling = manager.requests[-1].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0, 5, ("x",))
    assert sampling.repetition_penalty == 1.1
    bad = http.post("/api/chat", json={**CHAT, "options": {"temperature": "hot"}})
    assert bad.status_code == 400
    assert "options.temperature" in bad.json()["error"]


def test_calls_come_whole_with_object_arguments(http: httpx2.Client, manager: Any) -> None:
    """A tool call is one line, its arguments an object."""
    manager.script = manager.events(
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="c", name="get", arguments='{"a"'),)),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, arguments=":1}"),)),
        ChoiceDelta(finish_reason="tool_calls"),
    )
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    got = lines(http.post("/api/chat", json={**CHAT, "tools": tools}).text)
    calls = [g["message"]["tool_calls"] for g in got if g["message"].get("tool_calls")]
    assert calls[0][0]["function"]["arguments"] == {"a": 1}


def test_models_are_listed_and_unknown_ones_refused(http: httpx2.Client) -> None:
    """tags, ps and version answer; an unknown model is a 404 with a text; managing files without a library is refused."""
    assert http.get("/api/tags").json()["models"][0]["name"] == "tiny"
    assert http.get("/api/ps").json()["models"][0]["model"] == "tiny"
    assert http.get("/api/version").json()["version"]
    missing = http.post("/api/chat", json={**CHAT, "model": "none"})
    assert missing.status_code == 404
    assert "none" in missing.json()["error"]
    assert http.post("/api/pull", json={"model": "x"}).status_code == 400
    assert http.request("DELETE", "/api/delete", json={"model": "x"}).status_code == 400
    assert http.post("/api/copy", json={"source": "x", "destination": "y"}).status_code == 400


def test_tokens_go_both_ways(http: httpx2.Client) -> None:
    """Tokenize and detokenize invert each other; the only model needs no name."""
    tokens = http.post("/tokenize", json={"prompt": "Hi"}).json()
    assert tokens == {"tokens": [72, 105], "count": 2, "max_model_len": 512}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == "Hi"
    assert http.get("/tokenizer_info").json()["max_model_len"] == 512
    assert http.post("/tokenize", json={}).status_code == 400
