"""The ollama package: usage ollama_python.py ROOT_URL."""

from __future__ import annotations

import sys
from typing import Any

import ollama
from runner import check, run

client = ollama.Client(host=sys.argv[1])
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def say(text: str, **kwargs: Any) -> Any:
    return client.chat(model="mock", messages=[{"role": "user", "content": text}], **kwargs)


@check
def chat_plain() -> None:
    answer = say("hello")
    assert answer.message.content == "Hello there, friend."
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.eval_count > 0
    assert answer.total_duration > 0


@check
def chat_stream() -> None:
    parts = list(say("hello", stream=True))
    assert "".join(p.message.content for p in parts) == "Hello there, friend."
    assert parts[-1].done


@check
def chat_options() -> None:
    answer = say("hello", options={"num_predict": 5, "temperature": 0, "seed": 1})
    assert (answer.message.content, answer.done_reason) == ("Hello", "length")
    assert say("hello", options={"stop": [" there"]}).message.content == "Hello"


@check
def chat_latest_tag() -> None:
    answer = client.chat(model="mock:latest", messages=[{"role": "user", "content": "hello"}])
    assert answer.message.content == "Hello there, friend."


@check
def chat_tools() -> None:
    call = say("weather?", tools=[TOOL]).message.tool_calls[0]
    assert (call.function.name, dict(call.function.arguments)) == ("get_weather", {"city": "Paris"})


@check
def chat_tools_stream() -> None:
    calls = [c for p in say("weather?", tools=[TOOL], stream=True) for c in p.message.tool_calls or ()]
    assert dict(calls[0].function.arguments) == {"city": "Paris"}


@check
def chat_tool_result() -> None:
    first = say("weather?", tools=[TOOL]).message
    messages: Any = [
        {"role": "user", "content": "weather?"},
        first,
        {"role": "tool", "tool_name": "get_weather", "content": "18"},
    ]
    answer = client.chat(model="mock", messages=messages, tools=[TOOL])
    assert answer.message.content == "It is 18 degrees in Paris."


@check
def chat_thinking() -> None:
    answer = say("ponder", think=True)
    assert answer.message.thinking
    assert answer.message.content.strip() == "Forty-two."


@check
def chat_format() -> None:
    schema: Any = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    assert '"Ada"' in say("as JSON", format=schema).message.content
    assert '"Ada"' in say("as JSON", format="json").message.content


@check
def generate_plain() -> None:
    answer = client.generate(model="mock", prompt="hello")
    assert answer.response == "Hello there, friend."


@check
def generate_stream() -> None:
    assert (
        "".join(p.response for p in client.generate(model="mock", prompt="hello", stream=True))
        == "Hello there, friend."
    )


@check
def generate_raw() -> None:
    assert client.generate(model="mock", prompt="hello", raw=True).response == "Hello there, friend."


@check
def list_models() -> None:
    assert "mock" in [m.model for m in client.list().models]


@check
def show_and_ps() -> None:
    assert client.show("mock").modelinfo
    assert client.ps().models[0].model == "mock"


@check
def error_not_found() -> None:
    try:
        client.chat(model="none", messages=[{"role": "user", "content": "x"}])
    except ollama.ResponseError as error:
        assert error.status_code == 404
        assert "none" in error.error
        return
    raise AssertionError("an unknown model was served")


@check
def error_bad_request() -> None:
    try:
        say("hello", options={"temperature": 9})
    except ollama.ResponseError as error:
        assert error.status_code == 400
        return
    raise AssertionError("a temperature of 9 was taken")


@check
async def chat_async() -> None:
    aclient = ollama.AsyncClient(host=sys.argv[1])
    answer = await aclient.chat(model="mock", messages=[{"role": "user", "content": "hello"}])
    assert answer.message.content == "Hello there, friend."


run()
