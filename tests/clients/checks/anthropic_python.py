"""The anthropic package: usage anthropic_python.py ROOT_URL."""

from __future__ import annotations

import json
import sys
from typing import Any

import anthropic
from runner import check, run

ROOT = sys.argv[1]
client = anthropic.Anthropic(base_url=ROOT, api_key="none", max_retries=0, timeout=30)
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def say(text: str, **kwargs: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.messages.create(model="mock", max_tokens=200, messages=messages, **kwargs)


@check
def message_plain() -> None:
    answer = say("hello", system="Be kind.")
    assert answer.content[0].text == "Hello there, friend."
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0
    assert answer._request_id


@check
def message_stream_events() -> None:
    kinds, text = [], ""
    for event in say("hello", stream=True):
        kinds.append(event.type)
        if event.type == "content_block_delta":
            text += event.delta.text
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert text == "Hello there, friend."


@check
def message_stream_helper() -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    with client.messages.stream(model="mock", max_tokens=200, messages=messages) as stream:
        assert "".join(stream.text_stream) == "Hello there, friend."
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0


@check
def message_max_tokens() -> None:
    answer = client.messages.create(model="mock", max_tokens=5, messages=[{"role": "user", "content": "hello"}])
    assert (answer.content[0].text, answer.stop_reason) == ("Hello", "max_tokens")


@check
def message_stop_sequence() -> None:
    answer = say("hello", stop_sequences=[", "])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("Hello there", "stop_sequence", ", ")


@check
def message_tools() -> None:
    answer = say("weather?", tools=[TOOL])
    call = next(b for b in answer.content if b.type == "tool_use")
    assert (call.name, call.input, answer.stop_reason) == ("get_weather", {"city": "Paris"}, "tool_use")


@check
def message_tools_stream() -> None:
    messages: Any = [{"role": "user", "content": "weather?"}]
    with client.messages.stream(model="mock", max_tokens=200, messages=messages, tools=[TOOL]) as stream:
        pieces = "".join(e.partial_json for e in stream if e.type == "input_json")
        final = stream.get_final_message()
    assert json.loads(pieces) == {"city": "Paris"}
    assert next(b for b in final.content if b.type == "tool_use").input == {"city": "Paris"}


@check
def message_tool_result() -> None:
    first = say("weather?", tools=[TOOL])
    call = next(b for b in first.content if b.type == "tool_use")
    messages: Any = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": [b.model_dump() for b in first.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "18"}]},
    ]
    answer = client.messages.create(model="mock", max_tokens=200, messages=messages, tools=[TOOL])
    assert answer.content[-1].text == "It is 18 degrees in Paris."


@check
def message_thinking() -> None:
    answer = say("ponder", thinking={"type": "enabled", "budget_tokens": 1024})
    assert [b.type for b in answer.content] == ["thinking", "text"]
    assert "Let me see." in answer.content[0].thinking


@check
def message_content_blocks() -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    answer = client.messages.create(model="mock", max_tokens=200, messages=messages)
    assert answer.content[0].text == "Hello there, friend."


@check
def count_tokens() -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    short = client.messages.count_tokens(model="mock", messages=messages).input_tokens
    long = client.messages.count_tokens(model="mock", messages=messages, system="Be kind.").input_tokens
    assert 0 < short < long
    assert client.messages.create(model="mock", max_tokens=5, messages=messages).usage.input_tokens <= short


@check
def models() -> None:
    assert "mock" in [m.id for m in client.models.list()]
    assert client.models.retrieve("mock").type == "model"


@check
def error_not_found() -> None:
    try:
        client.messages.create(model="none", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
        assert error.request_id
        return
    raise AssertionError("an unknown model was served")


@check
def error_bad_request() -> None:
    try:
        say("hello", extra_body={"temperature": 3})
    except anthropic.BadRequestError as error:
        assert "temperature" in str(error)
        return
    raise AssertionError("a temperature of 3 was taken")


@check
def error_overloaded() -> None:
    try:
        say("go away")
    except anthropic.APIStatusError as error:
        assert error.status_code == 503
        return
    raise AssertionError("no 503")


@check
def error_in_mid_stream() -> None:
    try:
        list(say("break off", stream=True))
    except anthropic.APIStatusError:
        return
    raise AssertionError("the stream ended as if all were well")


@check
async def message_async() -> None:
    async with anthropic.AsyncAnthropic(base_url=ROOT, api_key="none", max_retries=0) as aclient:
        messages: Any = [{"role": "user", "content": "hello"}]
        async with aclient.messages.stream(model="mock", max_tokens=200, messages=messages) as stream:
            text = "".join([piece async for piece in stream.text_stream])
    assert text == "Hello there, friend."


run()
