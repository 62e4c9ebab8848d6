"""Our answers against the published description of the OpenAI API."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from sagellm_protocol.generation import ChoiceDelta, TokenLogprob, ToolCallDelta

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]


def nullable(node: Any) -> Any:
    """Spell ``nullable`` (of OpenAPI 3.0, which the description still uses) as JSON Schema does."""
    if isinstance(node, list):
        return [nullable(n) for n in node]
    if not isinstance(node, dict):
        return node
    plain = {k: nullable(v) for k, v in node.items() if k != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    document = nullable(json.loads((Path(__file__).parent / "fixtures" / "openai_schemas.json").read_text()))
    registry = Registry().with_resource("urn:openai", Resource.from_contents(document, DRAFT202012))
    return jsonschema.Draft202012Validator({"$ref": f"urn:openai#/components/schemas/{name}"}, registry=registry)


def chunks(http: httpx2.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    return [json.loads(b[6:]) for b in text.split("\n\n") if b.startswith("data: {")]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"logprobs": True, "top_logprobs": 2},
    {"tools": TOOLS, "tool_choice": "required"},
    {"max_tokens": 1},
]


@pytest.fixture(params=["text", "tools", "reasoning", "length", "stop"])
def says(request: Any, manager: Any) -> str:
    """What the model does."""
    logprobs = (TokenLogprob(token_id=1, logprob=float("-inf"), text="a", data=b"a"),)
    scripts: dict[str, Any] = {
        "text": manager.say("a", "b"),
        "tools": manager.events(
            ChoiceDelta(text="x", logprobs=logprobs),
            ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="c", name="get", arguments="{"),)),
            ChoiceDelta(tool_calls=(ToolCallDelta(index=0, arguments="}"),)),
            ChoiceDelta(finish_reason="tool_calls"),
        ),
        "reasoning": manager.events(ChoiceDelta(reasoning="r"), ChoiceDelta(text="a", finish_reason="stop")),
        "length": manager.say("a", finish="length"),
        "stop": manager.say("a", stop_match="x"),
    }
    manager.script = scripts[request.param]
    return str(request.param)


@pytest.mark.parametrize("change", VARIANTS, ids=range(len(VARIANTS)))
def test_chat_answers_and_chunks_are_valid(http: httpx2.Client, says: str, change: dict[str, Any]) -> None:
    """Every chat completion and every chunk fits the published schema."""
    if "n" in change and says not in ("text", "length", "stop"):
        pytest.skip("the script speaks for one choice")
    answer = http.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 200
    validator("CreateChatCompletionResponse").validate(answer.json())
    got = chunks(http, "/v1/chat/completions", {**CHAT, **change})
    assert got
    for chunk in got:
        validator("CreateChatCompletionStreamResponse").validate(chunk)


@pytest.mark.parametrize("change", [{}, {"logprobs": 2}, {"echo": True}, {"n": 2}], ids=range(4))
def test_completions_are_valid(http: httpx2.Client, change: dict[str, Any]) -> None:
    """Every completion and every chunk fits the published schema."""
    body = {"model": "tiny", "prompt": "Hi", **change}
    validator("CreateCompletionResponse").validate(http.post("/v1/completions", json=body).json())
    for chunk in chunks(http, "/v1/completions", body):
        # The schema describes the whole answer: in chunks the API sends null for what is not there yet.
        if chunk.get("usage") is None:
            chunk.pop("usage")
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        validator("CreateCompletionResponse").validate(chunk)


def test_other_objects_are_valid(http: httpx2.Client) -> None:
    """Models, files, batches and errors fit the published schemas."""
    validator("ListModelsResponse").validate(http.get("/v1/models").json())
    validator("Model").validate(http.get("/v1/models/tiny").json())
    file = http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "batch"}).json()
    file["expires_at"] = file["expires_at"] or 0
    validator("OpenAIFile").validate(file)
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = http.post("/v1/batches", json=body).json()
    validator("Batch").validate({k: v for k, v in batch.items() if v is not None})
    for wrong in ({**CHAT, "model": "no"}, {**CHAT, "n": 0}, {}):
        validator("ErrorResponse").validate(http.post("/v1/chat/completions", json=wrong).json())
    validator("ErrorResponse").validate(http.get("/nowhere").json())
