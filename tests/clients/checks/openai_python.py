"""The openai package: usage openai_python.py ROOT_URL."""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any

import openai
import pydantic
from runner import check, run

ROOT = sys.argv[1]
client = openai.OpenAI(base_url=f"{ROOT}/v1", api_key="none", max_retries=0, timeout=30)
MODEL = "mock"


class Person(pydantic.BaseModel):
    name: str
    age: int


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
FLAT: Any = {"type": "function", **TOOL["function"]}


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def chat(text: str, **kwargs: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=user(text), **kwargs)


@check
def chat_plain() -> None:
    answer = chat("hello")
    assert answer.choices[0].message.content == "Hello there, friend."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


@check
def chat_stream() -> None:
    chunks = list(chat("hello", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello there, friend."
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({c.id for c in chunks}) == 1


@check
def chat_stream_usage() -> None:
    chunks = list(chat("hello", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(c.usage is None for c in chunks[:-1])


@check
def chat_stream_helper() -> None:
    with client.chat.completions.stream(model=MODEL, messages=user("hello")) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == "Hello there, friend."


@check
def chat_n() -> None:
    answer = chat("choose", n=3, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} <= {"red", "green", "blue"}


@check
def chat_n_stream() -> None:
    texts = ["", ""]
    for chunk in chat("hello", n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello there, friend."] * 2


@check
def chat_seed() -> None:
    one, two = (chat("choose", seed=11).choices[0].message.content for _ in range(2))
    assert one == two


@check
def chat_logprobs() -> None:
    content = chat("hello", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(e.token for e in content).startswith("Hello")
    assert all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in content)
    assert bytes(b for e in content for b in e.bytes).decode().startswith("Hello")


@check
def chat_logprobs_stream() -> None:
    entries = []
    for chunk in chat("hello", logprobs=True, stream=True):
        if chunk.choices[0].logprobs:
            entries += chunk.choices[0].logprobs.content
    assert "".join(e.token for e in entries).startswith("Hello")


@check
def chat_max_tokens() -> None:
    answer = chat("hello", max_tokens=5)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "length"
    assert list(chat("hello", max_completion_tokens=5, stream=True))[-1].choices[0].finish_reason == "length"


@check
def chat_stop() -> None:
    answer = chat("hello", stop=[" there", "zzz"])
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    text = "".join(c.choices[0].delta.content or "" for c in chat("hello", stop=", fri", stream=True))
    assert text == "Hello there"


@check
def chat_tools() -> None:
    choice = chat("weather?", tools=[TOOL]).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@check
def chat_tools_stream() -> None:
    name, arguments, ids, reason = "", "", set(), None
    for chunk in chat("weather?", tools=[TOOL], stream=True):
        choice = chunk.choices[0]
        for piece in choice.delta.tool_calls or ():
            if piece.id:
                ids.add(piece.id)
                assert piece.function.arguments == ""
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
        reason = choice.finish_reason or reason
    assert (name, json.loads(arguments), len(ids), reason) == ("get_weather", {"city": "Paris"}, 1, "tool_calls")


@check
def chat_tools_stream_helper() -> None:
    with client.chat.completions.stream(model=MODEL, messages=user("weather?"), tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert done
    assert done[0].parsed_arguments == {"city": "Paris"}
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == {"city": "Paris"}


@check
def chat_two_tool_calls() -> None:
    calls = chat("two cities", tools=[TOOL]).choices[0].message.tool_calls
    assert [json.loads(c.function.arguments)["city"] for c in calls] == ["Rome", "Oslo"]
    assert len({c.id for c in calls}) == 2


@check
def chat_tool_result() -> None:
    message = chat("weather?", tools=[TOOL]).choices[0].message
    history = [
        *user("weather?"),
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=history, tools=[TOOL])
    assert answer.choices[0].message.content == "It is 18 degrees in Paris."


@check
def chat_reasoning() -> None:
    message = chat("ponder").choices[0].message
    assert message.content.strip() == "Forty-two."
    assert "Let me see." in message.reasoning_content


@check
def chat_parse() -> None:
    parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
    answer = parse(model=MODEL, messages=user("as JSON"), response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)


@check
def chat_json_object() -> None:
    answer = chat("as JSON", response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content)["name"] == "Ada"


@check
def chat_raw_headers() -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("hello"), extra_body={"frobnicate": 1}
    )
    assert raw.headers["x-sagellm-ignored-params"] == "frobnicate"
    assert raw.headers["x-request-id"]


@check
def chat_request_id_is_kept() -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("hello"), extra_headers={"X-Request-Id": "mine-42"}
    )
    assert raw.headers["x-request-id"] == "mine-42"


@check
def chat_close_stream_early() -> None:
    stream = chat("count slowly", stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    assert chat("hello").choices[0].message.content == "Hello there, friend."


@check
async def chat_async() -> None:
    async with openai.AsyncOpenAI(base_url=f"{ROOT}/v1", api_key="none", max_retries=0) as aclient:
        answer = await aclient.chat.completions.create(model=MODEL, messages=user("hello"))
        assert answer.choices[0].message.content == "Hello there, friend."
        text = ""
        async for chunk in await aclient.chat.completions.create(model=MODEL, messages=user("hello"), stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == "Hello there, friend."


@check
def completion_plain() -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=50)
    assert answer.choices[0].text == "Hello there, friend."
    assert answer.object == "text_completion"


@check
def completion_stream() -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="hello", max_tokens=50, stream=True))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "Hello there, friend."


@check
def completion_prompts() -> None:
    answer = client.completions.create(model=MODEL, prompt=["hello", "choose"], max_tokens=50, n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text == "Hello there, friend."


@check
def completion_suffix() -> None:
    answer = client.completions.create(model=MODEL, prompt="def hello", suffix="friend", max_tokens=50)
    assert answer.choices[0].text == "Hello there, friend."
    assert answer.usage.prompt_tokens == 4 + len("def hellofriend")


@check
def responses_item_reference() -> None:
    one = client.responses.create(model=MODEL, input="hello")
    reference = {"type": "item_reference", "id": one.output[0].id}
    asked = [{"role": "user", "content": "hello"}, reference, {"role": "user", "content": "hello again"}]
    assert client.responses.create(model=MODEL, input=asked).output_text == "Hello there, friend."


@check
def completion_echo_scores() -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", echo=True, max_tokens=0, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "hello"
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)


@check
def models() -> None:
    assert MODEL in [m.id for m in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def responses_plain() -> None:
    answer = client.responses.create(model=MODEL, input="hello")
    assert answer.output_text == "Hello there, friend."
    assert answer.status == "completed"
    assert answer.usage.total_tokens > 0


@check
def responses_state() -> None:
    one = client.responses.create(model=MODEL, input="hello", instructions="Be kind.")
    two = client.responses.create(model=MODEL, input="hello again", previous_response_id=one.id)
    assert two.previous_response_id == one.id
    items = list(client.responses.input_items.list(two.id))
    assert len(items) >= 3
    assert client.responses.retrieve(one.id).output_text == one.output_text
    client.responses.delete(one.id)
    try:
        client.responses.retrieve(one.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted response was found")


@check
def responses_stream() -> None:
    kinds, text = [], ""
    for event in client.responses.create(model=MODEL, input="hello", stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert text == "Hello there, friend."


@check
def responses_stream_helper() -> None:
    with client.responses.stream(model=MODEL, input="as JSON", text_format=Person) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == Person(name="Ada", age=36)


@check
def responses_parse() -> None:
    assert client.responses.parse(model=MODEL, input="as JSON", text_format=Person).output_parsed == Person(
        name="Ada", age=36
    )


@check
def responses_tools() -> None:
    answer = client.responses.create(model=MODEL, input="weather?", tools=[FLAT])
    call = next(item for item in answer.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Paris"}
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "18"}]
    after = client.responses.create(model=MODEL, input=result, previous_response_id=answer.id, tools=[FLAT])
    assert after.output_text == "It is 18 degrees in Paris."


@check
def responses_background() -> None:
    answer = client.responses.create(model=MODEL, input="hello", background=True)
    end = time.monotonic() + 20
    while answer.status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.02)
        answer = client.responses.retrieve(answer.id)
    assert answer.output_text == "Hello there, friend."


@check
def responses_cancel() -> None:
    answer = client.responses.create(model=MODEL, input="count slowly", background=True)
    assert client.responses.cancel(answer.id).status in ("cancelled", "completed")


@check
def error_not_found() -> None:
    try:
        client.chat.completions.create(model="none", messages=user("hello"))
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
        assert error.request_id
        return
    raise AssertionError("an unknown model was served")


@check
def error_bad_request() -> None:
    try:
        chat("hello", temperature=9)
    except openai.BadRequestError as error:
        assert (error.param, error.type) == ("temperature", "invalid_request_error")
        return
    raise AssertionError("a temperature of 9 was taken")


@check
def error_rate_limit() -> None:
    try:
        chat("deny me")
    except openai.RateLimitError as error:
        assert error.status_code == 429
        return
    raise AssertionError("no 429")


@check
def error_unavailable() -> None:
    try:
        chat("go away")
    except openai.InternalServerError as error:
        assert error.status_code == 503
        return
    raise AssertionError("no 503")


@check
def error_is_retried() -> None:
    seen = []

    def note(request: Any) -> None:
        seen.append(request.headers.get("x-stainless-retry-count"))

    http = openai.DefaultHttpxClient(event_hooks={"request": [note]})
    retrying = openai.OpenAI(base_url=f"{ROOT}/v1", api_key="none", max_retries=1, http_client=http)
    try:
        retrying.chat.completions.create(model=MODEL, messages=user("go away"))
    except openai.InternalServerError:
        assert seen == ["0", "1"]
        return
    raise AssertionError("no 503")


@check
def error_in_mid_stream() -> None:
    try:
        list(chat("break off", stream=True))
    except openai.APIError as error:
        assert "/" not in str(error)
        return
    raise AssertionError("the stream ended as if all were well")


@check
def files_and_batches() -> None:
    row = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": user("hello")},
    }
    file = client.files.create(file=("in.jsonl", io.BytesIO(json.dumps(row).encode())), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    end = time.monotonic() + 30
    while batch.status not in ("completed", "failed"):
        assert time.monotonic() < end
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    result = json.loads(client.files.content(batch.output_file_id).text)
    assert result["response"]["body"]["choices"][0]["message"]["content"] == "Hello there, friend."


@check
def embeddings() -> None:
    # The client asks for base64 unless told otherwise, and turns it into floats.
    model = next((m.id for m in client.models.list() if getattr(m, "kind", "") == "embedding"), MODEL)
    answer = client.embeddings.create(model=model, input=["hello", "world"])
    assert len(answer.data) == 2
    floats = client.embeddings.create(model=model, input="hello", encoding_format="float").data[0].embedding
    assert all(abs(a - b) < 1e-5 for a, b in zip(floats, answer.data[0].embedding, strict=True))
    assert len(client.embeddings.create(model=model, input="hello", dimensions=8).data[0].embedding) == 8


run()
