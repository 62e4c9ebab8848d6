from __future__ import annotations

import json
import time
from typing import Any

import httpx2
import openai
import pytest

from sagellm_gateway.server import create_app
from sagellm_protocol.errors import EngineDiedError, UnavailableError
from sagellm_protocol.generation import ChoiceDelta, ToolCallDelta

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def frames(text: str) -> list[Any]:
    out: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block[6:]
            out.append(data if data == "[DONE]" else json.loads(data))
    return out


def test_create_app_makes_a_new_app_each_time(manager: Any) -> None:
    """Two calls of create_app share nothing."""
    one, two = create_app(manager), create_app(manager)
    assert one is not two
    assert one.state.gateway is not two.state.gateway


def test_chat_answers_in_one_piece(http: httpx2.Client) -> None:
    """A plain chat completion has the text, the finish reason, usage and a matching id prefix."""
    answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200
    body = answer.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello, world", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 10


def test_stream_is_framed_to_the_letter(http: httpx2.Client) -> None:
    """Role first, finish reason last, one usage chunk without choices, then [DONE]; id and created never change."""
    answer = http.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    got = frames(answer.text)
    assert got[-1] == "[DONE]"
    chunks = got[:-1]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hello, world"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert [c["choices"] for c in chunks].count([]) == 1
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(c["usage"] is None for c in chunks[:-1])
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1


def test_stream_without_usage_has_no_usage_chunk(http: httpx2.Client) -> None:
    """Without include_usage no chunk lacks choices."""
    got = frames(http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text)
    assert all(c["choices"] for c in got[:-1])


EACH = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    ("path", "body", "prompt_tokens"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 2}, 7),
        ("/v1/completions", {"model": "tiny", "prompt": "Say", "n": 2}, 7),
        ("/v1/completions", {"model": "tiny", "prompt": ["Say", "So"]}, 14),
    ],
)
def test_each_chunk_tells_the_tokens_so_far(
    http: httpx2.Client, path: str, body: dict[str, Any], prompt_tokens: int
) -> None:
    """With continuous_usage_stats the count grows by what each chunk brings, over all choices, up to the last one's."""
    chunks = frames(http.post(path, json={**body, **EACH}).text)[:-1]
    assert chunks[-1]["choices"] == []
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert set(range(1, 7)) <= set(counts)
    assert counts[-1] == counts[-2] == 6
    assert chunks[-2]["usage"].items() <= chunks[-1]["usage"].items()
    assert chunks[-1]["usage"]["prompt_tokens"] == prompt_tokens


def test_usage_of_each_chunk_needs_usage(http: httpx2.Client) -> None:
    """continuous_usage_stats without include_usage is refused with what it needs."""
    answer = http.post(
        "/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    )
    assert answer.status_code == 400
    assert "needs stream_options.include_usage" in answer.json()["error"]["message"]


def test_n_choices_stream_with_their_index(http: httpx2.Client) -> None:
    """Each of n choices has its own role chunk, text and finish reason."""
    got = frames(http.post("/v1/chat/completions", json={**CHAT, "n": 3, "stream": True}).text)[:-1]
    for i in range(3):
        mine = [c["choices"][0] for c in got if c["choices"][0]["index"] == i]
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hello, world"
        assert mine[-1]["finish_reason"] == "stop"


def test_tool_calls_stream_head_first(http: httpx2.Client, manager: Any) -> None:
    """The first piece of a call has id, type, name and empty arguments; the rest index and arguments."""
    manager.script = manager.events(
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="call_1", name="get", arguments='{"a"'),)),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, arguments=":1}"),)),
        ChoiceDelta(finish_reason="tool_calls"),
    )
    tools = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
    got = frames(http.post("/v1/chat/completions", json={**CHAT, "tools": tools, "stream": True}).text)[1:-1]
    calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in got[:-1]]
    assert calls[0] == {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get", "arguments": ""}}
    assert calls[1:] == [{"index": 0, "function": {"arguments": p}} for p in ('{"a"', ":1}")]
    assert got[-1]["choices"][0]["finish_reason"] == "tool_calls"
    plain = http.post("/v1/chat/completions", json={**CHAT, "tools": tools}).json()["choices"][0]
    assert plain["message"]["tool_calls"][0]["function"] == {"name": "get", "arguments": '{"a":1}'}
    assert plain["message"]["content"] is None


def test_reasoning_is_apart_from_content(http: httpx2.Client, manager: Any) -> None:
    """Thoughts arrive as reasoning_content, never in content."""
    manager.script = manager.events(
        ChoiceDelta(reasoning="hm"), ChoiceDelta(text="yes"), ChoiceDelta(finish_reason="stop")
    )
    message = http.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    got = frames(http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text)
    assert got[1]["choices"][0]["delta"] == {"reasoning_content": "hm"}


def test_logprobs_are_json_even_when_infinite(http: httpx2.Client) -> None:
    """Minus infinity becomes -9999, and bytes are given."""
    body = http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 1}).json()
    entry = body["choices"][0]["logprobs"]["content"][0]
    assert entry["bytes"] == list(b"Hello")
    assert entry["top_logprobs"][0]["logprob"] == -9999.0


def test_ping_keeps_a_silent_stream_alive(server: Any, manager: Any) -> None:
    """A stream without events is opened after the first seconds and carries comments."""
    manager.script = manager.events(wait=True)
    with (
        httpx2.Client(base_url=server.url, timeout=10, trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
    ):
        seen = ""
        for part in answer.iter_text():
            seen += part
            if seen.count(": ping\n\n") >= 2:
                break
    assert '"role":"assistant"' in seen


def test_failure_before_the_first_event_is_a_status(http: httpx2.Client, manager: Any) -> None:
    """No healthy engine: 503 with Retry-After in the OpenAI shape, also when streaming was asked for."""

    async def script(request: Any) -> Any:
        raise UnavailableError("no engine is ready for tiny: try again", retry_after_s=2)
        yield

    manager.script = script
    for stream in (False, True):
        answer = http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "2"
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_failure_in_mid_stream_is_an_event_without_done(http: httpx2.Client, manager: Any) -> None:
    """A broken stream ends with an error event and no [DONE]."""
    manager.script = manager.events(ChoiceDelta(text="a"), then=EngineDiedError("the engine ended"))
    got = frames(http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text)
    assert got[-1]["error"]["code"] == "engine_died"
    assert "[DONE]" not in got


def test_unexpected_failure_is_a_clean_500(http: httpx2.Client, manager: Any, caplog: Any) -> None:
    """A bug of ours tells the client nothing but the request id's existence."""
    manager.script = manager.events(then=RuntimeError("/secret/path 10.0.0.1"))
    answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"


def test_completions_take_text_lists_and_tokens(http: httpx2.Client, manager: Any) -> None:
    """A prompt may be a string, strings, token ids or lists of them; choices are numbered over all."""
    for prompt, count in (("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1], [2, 3]], 2)):
        body = http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "n": 2}).json()
        assert [c["index"] for c in body["choices"]] == list(range(2 * count))
        assert {c["text"] for c in body["choices"]} == {"Hello, world"}
        assert body["usage"]["prompt_tokens"] == 7 * count
    assert all(r.messages is None for r in manager.requests)
    end = time.monotonic() + 5
    while manager.open:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_completions_stream_and_echo(http: httpx2.Client) -> None:
    """Echo puts the prompt first; the stream has text chunks, a finish reason and [DONE]."""
    body = {"model": "tiny", "prompt": "Say ", "echo": True}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "Say Hello, world"
    got = frames(http.post("/v1/completions", json={**body, "stream": True}).text)
    assert "".join(c["choices"][0]["text"] for c in got[:-1]) == "Say Hello, world"
    assert got[-2]["choices"][0]["finish_reason"] == "stop"


def test_unknown_fields_are_named_and_refused_ones_refused(http: httpx2.Client) -> None:
    """What has no effect is named in a header; what would change the meaning is a 400 with param."""
    answer = http.post("/v1/chat/completions", json={**CHAT, "frobnicate": 1, "service_tier": "auto"})
    assert answer.status_code == 200
    assert answer.headers["x-sagellm-ignored-params"] == "frobnicate,service_tier"
    answer = http.post("/v1/chat/completions", json={**CHAT, "chat_template": "{{ x }}"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template"


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"model": None}, 400, "model", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "context_length_exceeded"),
        ({"temperature": 3}, 400, "temperature", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": 10**9}, 400, "n", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": -1}, 400, "max_completion_tokens", "invalid_value"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ({"stream_options": {}}, 400, "stream_options", "invalid_value"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias", "invalid_value"),
        ({"stop": [""]}, 400, "stop", "invalid_value"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type", "invalid_value"),
        ({"tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
        ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            400,
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
    ],
)
def test_bad_requests_name_the_parameter(
    http: httpx2.Client, change: dict[str, Any], status: int, param: str, code: str
) -> None:
    """A wrong field gives the status, the four keys, the field's name and a code."""
    answer = http.post("/v1/chat/completions", json={**CHAT, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert error.keys() == {"message", "type", "param", "code"}


def test_probes_and_models(http: httpx2.Client) -> None:
    """Probes answer, the model is listed and found, an unknown one is a 404; the old prefix works."""
    assert http.get("/live").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200
    assert http.get("/health").json()["models"] == ["tiny"]
    assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert http.get("/v1/models/tiny").json()["object"] == "model"
    assert http.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert http.get("/api/v1/models").status_code == 200
    assert http.get("/version").json()["version"]
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/nowhere").json()["error"]["code"] == "unknown_url"


def test_official_client_works_unchanged(server: Any) -> None:
    """The openai package chats, streams with usage, lists models and raises its own error classes."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "Hi"}]
        plain = client.chat.completions.create(model="tiny", messages=messages)
        assert plain.choices[0].message.content == "Hello, world"
        text, usage = "", None
        for chunk in client.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
        ):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        assert (text, usage and usage.completion_tokens) == ("Hello, world", 3)
        assert client.completions.create(model="tiny", prompt="x").choices[0].text == "Hello, world"
        assert [m.id for m in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="no", messages=messages)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="tiny", messages=messages, temperature=9)
        assert wrong.value.param == "temperature"
