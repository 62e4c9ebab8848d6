from __future__ import annotations

import json
from typing import Any

import httpx2

from sagellm_protocol.generation import ChoiceDelta, ToolCallDelta

BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}


def events(text: str) -> list[dict[str, Any]]:
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        out.append(value)
    return out


def test_message_answers_in_one_piece(http: httpx2.Client) -> None:
    """A message has typed blocks, the stop reason in Anthropic's words, and usage."""
    body = http.post("/v1/messages", json=BODY).json()
    assert body["content"] == [{"type": "text", "text": "Hello, world"}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"]["input_tokens"] == 7
    assert body["id"].startswith("msg_")


def test_stream_opens_and_closes_each_block(http: httpx2.Client, manager: Any) -> None:
    """Thinking, text and two calls are four blocks in order, each started, filled and stopped."""
    manager.script = manager.events(
        ChoiceDelta(reasoning="hm"),
        ChoiceDelta(text="I "),
        ChoiceDelta(text="look"),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="t0", name="get", arguments='{"a":'),)),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, arguments="1}"),)),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=1, id="t1", name="get", arguments="{}"),)),
        ChoiceDelta(finish_reason="tool_calls"),
    )
    tools = [{"name": "get", "input_schema": {"type": "object"}}]
    got = events(http.post("/v1/messages", json={**BODY, "tools": tools, "stream": True}).text)
    kinds = [e["type"] for e in got if e["type"] != "ping"]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    starts = [e["content_block"]["type"] for e in got if e["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    assert [e["index"] for e in got if e["type"] == "content_block_stop"] == [0, 1, 2, 3]
    text = "".join(e["delta"].get("text", "") for e in got if e["type"] == "content_block_delta")
    assert text == "I look"
    calls = "".join(e["delta"].get("partial_json", "") for e in got if e.get("index") == 2 and "delta" in e)
    assert json.loads(calls) == {"a": 1}
    assert got[-2]["delta"]["stop_reason"] == "tool_use"
    plain = http.post("/v1/messages", json={**BODY, "tools": tools}).json()
    assert [b["type"] for b in plain["content"]] == starts
    assert plain["content"][2]["input"] == {"a": 1}


def test_stop_sequence_is_named(http: httpx2.Client, manager: Any) -> None:
    """A stop string that matched is stop_sequence with its text."""
    manager.script = manager.events(ChoiceDelta(text="a", finish_reason="stop", stop_match="END"))
    body = http.post("/v1/messages", json={**BODY, "stop_sequences": ["END"]}).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")


def test_history_becomes_neutral_turns(http: httpx2.Client, manager: Any) -> None:
    """System, tool use, tool results and thinking land in the right roles."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "tool_use", "id": "x", "name": "get", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "42"}]},
                {"type": "text", "text": "go on"},
            ],
        },
    ]
    assert http.post("/v1/messages", json={**BODY, "system": "be brief", "messages": messages}).status_code == 200
    turns = manager.requests[-1].messages
    assert [m.role for m in turns] == ["system", "user", "assistant", "tool", "user"]
    assert turns[2].reasoning == "t"
    assert turns[2].tool_calls[0].function.arguments == '{"a":1}'
    assert (turns[3].tool_call_id, turns[3].content) == ("x", "42")


def test_errors_have_anthropics_shape(http: httpx2.Client) -> None:
    """Errors are {type: error, error: {type, message}, request_id}, and the id is in the header too."""
    for change, status, kind in (
        ({"model": "no"}, 404, "not_found_error"),
        ({"temperature": 1.5}, 400, "invalid_request_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error"),
    ):
        answer = http.post("/v1/messages", json={**BODY, **change})
        body = answer.json()
        assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
        assert body["request_id"] == answer.headers["request-id"]


def test_models_speak_anthropic_when_asked(http: httpx2.Client) -> None:
    """With anthropic-version the model list has Anthropic's fields."""
    body = http.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert body["data"][0]["type"] == "model"
    assert body["has_more"] is False
