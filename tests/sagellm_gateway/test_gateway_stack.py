from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from sagellm_gateway.testing import Running

CHAT: dict[str, Any] = {"model": "mock", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


def test_every_dialect_gives_the_same_greedy_text(stack_http: httpx2.Client) -> None:
    """Chat, responses, messages and Ollama say the same for the same conversation at temperature 0."""
    chat = stack_http.post("/v1/chat/completions", json={**CHAT, "temperature": 0}).json()
    text = chat["choices"][0]["message"]["content"]
    assert chat["choices"][0]["finish_reason"] in ("length", "stop")
    body = {"model": "mock", "input": "Hi", "max_output_tokens": 8, "temperature": 0}
    response = stack_http.post("/v1/responses", json=body).json()
    assert "".join(p["text"] for i in response["output"] for p in i["content"]) == text
    message = stack_http.post("/v1/messages", json={**CHAT, "temperature": 0}).json()
    assert "".join(b["text"] for b in message["content"]) == text
    ollama = {"model": "mock", "messages": CHAT["messages"], "stream": False}
    said = stack_http.post("/api/chat", json={**ollama, "options": {"num_predict": 8, "temperature": 0}}).json()
    assert said["message"]["content"] == text


def test_logprobs_n_and_seed_through_the_stack(stack_http: httpx2.Client) -> None:
    """N choices with logprobs come back, and the same seed gives the same choices."""
    body = {**CHAT, "n": 3, "seed": 7, "logprobs": True, "top_logprobs": 2}
    one, two = (stack_http.post("/v1/chat/completions", json=body).json() for _ in range(2))
    assert one["choices"] == two["choices"]
    assert len(one["choices"]) == 3
    content = one["choices"][0]["logprobs"]["content"]
    assert len(content) == one["usage"]["completion_tokens"] / 3 or content
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_echo_scores_the_prompt(stack_http: httpx2.Client) -> None:
    """Echo with max_tokens 0 returns the prompt alone, one entry a token, the first without a probability."""
    body = {"model": "mock", "prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 1}
    choice = stack_http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == "abc"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    assert all(isinstance(x, float) for x in logprobs["token_logprobs"][1:])


def test_gaps_are_filled_by_every_route(stack_http: httpx2.Client) -> None:
    """Completions and Ollama's generate show the model both sides of a gap, and get the same text for it."""
    gap = {"model": "mock", "prompt": "def f(x):", "suffix": "    return y"}
    body = {**gap, "max_tokens": 8, "temperature": 0}
    filled = stack_http.post("/v1/completions", json=body).json()
    assert filled["usage"]["prompt_tokens"] == 4 + len("def f(x):    return y")
    text = filled["choices"][0]["text"]
    assert text != stack_http.post("/v1/completions", json={**body, "suffix": None}).json()["choices"][0]["text"]
    options = {"num_predict": 8, "temperature": 0}
    said = stack_http.post("/api/generate", json={**gap, "options": options, "stream": False}).json()
    assert said["response"] == text
    from_the_start = stack_http.post("/v1/completions", json={**body, "prompt": ""}).json()
    assert from_the_start["usage"]["prompt_tokens"] == 4 + len("    return y")


def test_overflow_has_both_numbers(stack_http: httpx2.Client) -> None:
    """A prompt beyond the context is 400 context_length_exceeded with its length and the window's."""
    answer = stack_http.post(
        "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": "x" * 5000}]}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "2048" in error["message"]


def test_metrics_show_the_control_plane(stack_http: httpx2.Client) -> None:
    """Engines, KV blocks, decisions and waiting requests are on /metrics, by model and engine."""
    stack_http.post("/v1/chat/completions", json=CHAT)
    text = stack_http.get("/metrics").text
    assert 'sagellm_engine_healthy{engine="mock",model="mock"} 1.0' in text
    for name in (
        "sagellm_engine_kv_blocks{",
        "sagellm_scheduler_decisions_total ",
        'sagellm_waiting_requests{model="mock"}',
    ):
        assert name in text
    assert 'sagellm_time_to_first_token_seconds_count{model="mock"}' in text


def test_management_shows_and_changes(stack_http: httpx2.Client) -> None:
    """Engines, status, backends, policy: read and set; what does not exist is a 404, what is wrong a 400."""
    listed = stack_http.get("/v1/management/engines").json()
    engine = listed["engines"][0]["engine_id"]
    assert listed["engines"][0]["state"] == "READY"
    assert stack_http.get(f"/v1/management/engines/{engine}").json()["health"]["healthy"] is True
    assert stack_http.get("/v1/management/engines/none").status_code == 404
    assert stack_http.get("/v1/management/status").json()["gateway"]["ready"] is True
    assert stack_http.get("/v1/management/backends").json()["backends"] == ["mock"]
    assert stack_http.get("/v1/management/gpu").status_code == 200
    policy = stack_http.get("/v1/management/policy").json()
    assert (
        stack_http.put("/v1/management/policy", json={"scheduling_policy": "fifo"}).json()["scheduling_policy"]
        == "fifo"
    )
    assert stack_http.put("/v1/management/policy", json={"scheduling_policy": "bogus"}).status_code == 400
    for half in ({"scheduling_policy": "bogus", "routing_strategy": "random"}, {"routing_strategy": "bogus"}):
        assert (
            stack_http.put("/v1/management/policy", json={"scheduling_policy": "priority", **half}).status_code == 400
        )
        kept = {"scheduling_policy": "fifo", "routing_strategy": policy["routing_strategy"]}
        assert stack_http.get("/v1/management/policy").json() == kept
    assert stack_http.put("/v1/management/policy", json=policy).json() == policy
    assert stack_http.post("/v1/management/engines/prune").json()["count"] == 0
    assert stack_http.get("/api/v1/management/engines").status_code == 200


@pytest.mark.parametrize("clients", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_disconnects_leave_nothing(stack_server: tuple[Any, Running], clients: int) -> None:
    """Clients that hang up at random moments (queued, prefill, decode), streaming or not, leave no request and no block."""
    stack, server = stack_server

    async def one(k: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps({**CHAT, "max_tokens": 1500, "stream": bool(k % 2)}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await asyncio.sleep((k * 7919 % 97) / 2000)
        writer.transport.abort()

    async def all_of_them() -> None:
        for start in range(0, clients, 200):
            await asyncio.gather(*(one(k) for k in range(start, start + 200)))
        for _ in range(500):
            status = await stack.engine.status()
            if not (status.running or status.waiting) and not stack.manager.get_status()["active_requests"]:
                break
            await asyncio.sleep(0.01)

    asyncio.run(all_of_them())
    status = asyncio.run(stack.engine.status())
    assert (status.running, status.waiting) == (0, 0)
    assert status.blocks_used - status.blocks_cached <= 0 or status.blocks_used == 0
    assert stack.manager.get_status()["active_requests"] == 0
    assert stack.manager.get_cluster_status()["open_leases"] == 0
