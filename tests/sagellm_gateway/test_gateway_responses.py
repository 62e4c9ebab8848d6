from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pydantic
import pytest

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.server import create_app
from sagellm_gateway.testing import running
from sagellm_protocol.errors import EngineDiedError
from sagellm_protocol.generation import ChoiceDelta, ToolCallDelta

spec = pytest.importorskip("openresponses_types", reason="the specification's types need Python 3.11")
MODELS = {
    next(iter(model.model_fields["type"].annotation)).value: model
    for name, model in vars(spec).items()
    if name.endswith("StreamingEvent")
}
BODY: dict[str, Any] = {"model": "tiny", "input": "Hi"}
TOOLS = [{"type": "function", "name": "get", "parameters": {"type": "object"}, "strict": False}]


def events(text: str) -> list[Any]:
    out: list[Any] = []
    for block in text.strip().split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n", 1)
            value = json.loads(data.removeprefix("data: "))
            assert name == f"event: {value['type']}"
            out.append(value)
        elif block.startswith("data: "):
            out.append(block[6:])
    return out


def check_events(got: list[Any]) -> None:
    """Every event fits its model of the Open Responses specification, and they are numbered without a gap."""
    assert [e["sequence_number"] for e in got] == list(range(len(got)))
    for event in got:
        MODELS[event["type"]].model_validate(event)


def test_response_is_whole_and_stored(http: httpx2.Client) -> None:
    """A plain answer is a ResponseResource and can be fetched, listed and deleted."""
    body = http.post("/v1/responses", json=BODY).json()
    spec.ResponseResource.model_validate(body)
    assert body["status"] == "completed"
    assert body["output"][0]["content"][0]["text"] == "Hello, world"
    assert http.get(f"/v1/responses/{body['id']}").json() == body
    items = http.get(f"/v1/responses/{body['id']}/input_items").json()
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "Hi"}]
    assert http.delete(f"/v1/responses/{body['id']}").json()["deleted"] is True
    assert http.get(f"/v1/responses/{body['id']}").status_code == 404


def test_unstored_response_is_not_retrievable(http: httpx2.Client) -> None:
    """store: false leaves nothing behind."""
    body = http.post("/v1/responses", json={**BODY, "store": False}).json()
    assert http.get(f"/v1/responses/{body['id']}").status_code == 404


def test_chain_carries_the_conversation(http: httpx2.Client, manager: Any) -> None:
    """previous_response_id puts the earlier items, also calls and their results, before the new ones."""
    manager.script = manager.events(
        ChoiceDelta(reasoning="hm"),
        ChoiceDelta(text="I look"),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="c0", name="get", arguments='{"a":1}'),)),
        ChoiceDelta(finish_reason="tool_calls"),
    )
    one = http.post("/v1/responses", json={**BODY, "tools": TOOLS, "instructions": "be brief"}).json()
    assert [item["type"] for item in one["output"]] == ["reasoning", "message", "function_call"]
    spec.ResponseResource.model_validate(one)
    manager.script = manager.say("42")
    output = {"type": "function_call_output", "call_id": "c0", "output": "42"}
    two = http.post("/v1/responses", json={**BODY, "input": [output], "previous_response_id": one["id"]}).json()
    turns = manager.requests[-1].messages
    assert [m.role for m in turns] == ["user", "assistant", "tool"]
    assert (turns[1].reasoning, turns[1].content, turns[1].tool_calls[0].id) == ("hm", "I look", "c0")
    assert two["previous_response_id"] == one["id"]
    missing = http.post("/v1/responses", json={**BODY, "previous_response_id": "resp_none"})
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "previous_response_id"


def test_items_are_referred_to_by_id(http: httpx2.Client, manager: Any) -> None:
    """A reference stands for an output item of a stored response; one that is not stored is a 404 that names it."""
    manager.script = manager.events(
        ChoiceDelta(reasoning="Hm."),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="call_1", name="get", arguments='{"a": 1}'),)),
        ChoiceDelta(finish_reason="tool_calls"),
    )
    first = http.post("/v1/responses", json={"model": "tiny", "input": "Hi", "tools": TOOLS}).json()
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    output = {"type": "function_call_output", "call_id": "call_1", "output": "2"}
    manager.script = manager.say("Two.")
    again = {"model": "tiny", "input": [{"role": "user", "content": "Hi"}, *references, output], "tools": TOOLS}
    second = http.post("/v1/responses", json=again)
    assert second.status_code == 200, second.text
    user, assistant, tool = manager.requests[-1].messages
    assert assistant.reasoning == "Hm."
    assert [(c.id, c.function.arguments) for c in assistant.tool_calls] == [("call_1", '{"a": 1}')]
    assert (user.content, tool.content) == ("Hi", "2")
    listed = http.get(f"/v1/responses/{second.json()['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert [item["type"] for item in listed] == ["message", "reasoning", "function_call", "function_call_output"]
    for unknown in ("fc_0", "fc_" + "0" * 24 + "_0", first["output"][0]["id"] + "9", "x"):
        lost = {"model": "tiny", "input": [{"type": "item_reference", "id": unknown}]}
        answer = http.post("/v1/responses", json=lost)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input[0]")


def test_stream_events_follow_the_specification(http: httpx2.Client, manager: Any) -> None:
    """Thoughts, text and calls stream as items that open, fill and close; every event validates."""
    manager.script = manager.events(
        ChoiceDelta(reasoning="hm"),
        ChoiceDelta(text="I "),
        ChoiceDelta(text="look"),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, id="c0", name="get", arguments='{"a":'),)),
        ChoiceDelta(tool_calls=(ToolCallDelta(index=0, arguments="1}"),)),
        ChoiceDelta(finish_reason="tool_calls"),
    )
    got = events(http.post("/v1/responses", json={**BODY, "tools": TOOLS, "stream": True}).text)
    assert got.pop() == "[DONE]"
    check_events(got)
    kinds = [e["type"] for e in got]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    final = got[-1]["response"]
    assert final["output"][1]["content"][0]["text"] == "I look"
    assert final["output"][2]["arguments"] == '{"a":1}'
    assert http.get(f"/v1/responses/{final['id']}").json() == final


def test_length_is_incomplete_and_logprobs_are_there(http: httpx2.Client, manager: Any) -> None:
    """A cut answer is incomplete with its reason; logprobs come where they were asked for."""
    manager.script = manager.say("a", finish="length")
    got = events(
        http.post("/v1/responses", json={**BODY, "stream": True, "include": ["message.output_text.logprobs"]}).text
    )[:-1]
    check_events(got)
    assert got[-1]["type"] == "response.incomplete"
    assert got[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    part = got[-1]["response"]["output"][0]["content"][0]
    assert part["logprobs"][0]["token"] == "a"


def test_failure_in_mid_stream_is_an_event(http: httpx2.Client, manager: Any) -> None:
    """A broken stream ends with error and response.failed, without [DONE]."""
    manager.script = manager.events(ChoiceDelta(text="a"), then=EngineDiedError("the engine ended"))
    got = events(http.post("/v1/responses", json={**BODY, "stream": True}).text)
    check_events(got)
    assert [e["type"] for e in got[-2:]] == ["error", "response.failed"]


def until_status(http: httpx2.Client, response_id: str, *wanted: str) -> dict[str, Any]:
    end = time.monotonic() + 5
    while True:
        body: dict[str, Any] = http.get(f"/v1/responses/{response_id}").json()
        if body["status"] in wanted:
            return body
        assert time.monotonic() < end, body["status"]
        time.sleep(0.01)


def test_background_response_completes_and_can_be_followed(http: httpx2.Client) -> None:
    """A background response is queued at once, completes unattended, and its events can be read from any number on."""
    body = http.post("/v1/responses", json={**BODY, "background": True}).json()
    assert body["status"] == "queued"
    spec.ResponseResource.model_validate(body)
    done = until_status(http, body["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == "Hello, world"
    got = events(http.get(f"/v1/responses/{body['id']}?stream=true").text)[:-1]
    check_events(got)
    rest = events(http.get(f"/v1/responses/{body['id']}?stream=true&starting_after=3").text)
    assert rest[0]["sequence_number"] == 4


def test_background_response_can_be_cancelled(http: httpx2.Client, manager: Any) -> None:
    """Cancel stops the work and keeps what was said; a foreground response cannot be cancelled."""
    manager.script = manager.events(ChoiceDelta(text="a"), wait=True)
    body = http.post("/v1/responses", json={**BODY, "background": True}).json()
    until_status(http, body["id"], "in_progress")
    assert http.post(f"/v1/responses/{body['id']}/cancel").json()["status"] == "cancelled"
    assert manager.open == 0
    manager.script = manager.say("x")
    plain = http.post("/v1/responses", json=BODY).json()
    assert http.post(f"/v1/responses/{plain['id']}/cancel").status_code == 400


def test_store_survives_a_restart(manager: Any, tmp_path: Path) -> None:
    """Stored responses are there after a restart; one that was under way is failed, not forgotten."""
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    with running(create_app(manager, config)) as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        kept = client.post("/v1/responses", json=BODY).json()
        manager.script = manager.events(wait=True)
        lost = client.post("/v1/responses", json={**BODY, "background": True}).json()
        until_status(client, lost["id"], "in_progress")
    manager.script = manager.say("x")
    with running(create_app(manager, config)) as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        assert client.get(f"/v1/responses/{kept['id']}").json() == kept
        assert client.get(f"/v1/responses/{lost['id']}").json()["status"] in ("cancelled", "failed")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True, "store": False}, "store"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"input": [{"type": "computer_call_output", "call_id": "x"}]}, "input[0]"),
    ],
)
def test_bad_requests_name_the_parameter(http: httpx2.Client, change: dict[str, Any], param: str) -> None:
    """What is wrong or not offered is a 400 that names it."""
    answer = http.post("/v1/responses", json={**BODY, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_official_client_keeps_state_and_parses(server: Any, manager: Any) -> None:
    """The openai package creates, chains, streams and parses structured output through responses."""

    class Answer(pydantic.BaseModel):
        a: int

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        one = client.responses.create(model="tiny", input="Hi")
        assert one.output_text == "Hello, world"
        two = client.responses.create(model="tiny", input="And?", previous_response_id=one.id)
        assert len(manager.requests[-1].messages) == 3
        assert client.responses.retrieve(two.id).output_text == "Hello, world"
        with client.responses.stream(model="tiny", input="Hi") as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text == "Hello, world"
        assert "response.output_text.delta" in kinds
        manager.script = manager.say('{"a": 1}')
        parsed = client.responses.parse(model="tiny", input="Hi", text_format=Answer)
        assert parsed.output_parsed == Answer(a=1)
        client.responses.delete(one.id)
