"""The client against the real server over the mock device, and against scripted servers for what a good server never does."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sagellm import AsyncUnifiedInferenceClient, UnifiedInferenceClient, discovery
from sagellm.results import ChatResult, Delta
from sagellm.structured import parse_output, response_format_of, tools_of
from sagellm.transport import RetryPolicy, Timeouts
from sagellm_protocol.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ModelNotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)


class ScriptedServer:
    """An HTTP server whose replies to POST are given one by one; GET /v1/models lists `models`."""

    def __init__(self, replies: list[Callable[[Any], object]], models: list[dict[str, Any]] | None = None) -> None:
        self.replies = replies
        self.requests: list[dict[str, Any]] = []
        rows = models if models is not None else [{"id": "scripted", "object": "model"}]
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                send_json(self, 200, {"data": rows})

            def do_POST(self) -> None:
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                outer.replies.pop(0)(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def send_json(handler: Any, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {
        "content-type": "application/json",
        "content-length": str(len(data)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def chat_reply(text: str) -> Callable[[Any], None]:
    body = {
        "id": "x",
        "model": "scripted",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
    }
    return lambda handler: send_json(handler, 200, body)


def error_reply(status: int, code: str, headers: dict[str, str] | None = None) -> Callable[[Any], None]:
    body = {"error": {"message": f"scripted {status}", "type": "error", "param": None, "code": code}}
    return lambda handler: send_json(handler, status, body, headers)


def stream_reply(words: list[str], *, whole: bool) -> Callable[[Any], None]:
    """Send chunks; unless `whole`, cut the connection after them."""

    def reply(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        for k, word in enumerate(words):
            last = whole and k == len(words) - 1
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": "stop" if last else None}
            handler.wfile.write(f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n".encode())
        if whole:
            handler.wfile.write(b"data: [DONE]\n\n")
        handler.close_connection = True

    return reply


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    servers: list[ScriptedServer] = []

    def make(*args: Any, **options: Any) -> ScriptedServer:
        servers.append(ScriptedServer(*args, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


QUICK = RetryPolicy(attempts=3, first_s=0.001, longest_s=0.2)


def test_a_result_is_the_json_and_its_text(mock_server: Any) -> None:
    """A reply can be read as the OpenAI JSON and by attributes, and cannot be changed."""
    with UnifiedInferenceClient(mock_server.base_url) as client:
        result = client.chat([{"role": "user", "content": "hi"}], max_tokens=8, temperature=0)
    assert result["choices"][0]["message"]["content"] == result.text == str(result)
    assert result.usage["completion_tokens"] == 8
    assert result.model == "mock"
    assert result.request_id == result["id"]
    assert result.latency_ms > 0
    assert result.finish_reason == "length"
    with pytest.raises(TypeError):
        result["model"] = "other"  # type: ignore[index]


def test_a_stream_adds_up_to_the_whole(mock_server: Any) -> None:
    """The deltas of a greedy answer are its text, in chat and in plain completion, sync and async."""
    with UnifiedInferenceClient.create(mock_server.root_url) as client:
        whole = client.chat("hi", max_tokens=24, temperature=0).text
        assert "".join(map(str, client.chat("hi", max_tokens=24, temperature=0, stream=True))) == whole
        plain = client.generate("Once upon", max_tokens=24, temperature=0).text
        assert "".join(map(str, client.generate("Once upon", max_tokens=24, temperature=0, stream=True))) == plain
        assert client.complete("Once upon", max_tokens=24, temperature=0).text == plain

    async def again() -> str:
        async with AsyncUnifiedInferenceClient.create(mock_server.root_url) as client:
            return "".join([d.text async for d in await client.chat("hi", max_tokens=24, temperature=0, stream=True)])

    assert asyncio.run(again()) == whole


def test_embedded_and_remote_draw_the_same_tokens(mock_server: Any) -> None:
    """The same seed gives the same text through the server and in this process, at any temperature."""
    with (
        UnifiedInferenceClient(mock_server.base_url) as remote,
        UnifiedInferenceClient.create(embedded=True, mock=True, engine={"mock": {"scale": 0}}) as here,
    ):
        for seed in range(3):
            options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.3, "seed": seed}
            assert remote.chat("hello", **options).text == here.chat("hello", **options).text
        assert remote.models() == here.models() == ["mock"]


@pytest.mark.model
def test_embedded_and_remote_agree_on_a_real_model(model_server: Any, default_model_path: Any) -> None:
    """On the native backend too, the same seed gives the same text in this process and through the server."""
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 7}
    with UnifiedInferenceClient(model_server.base_url) as remote:
        expected = remote.chat("Name three colours.", **options).text
    with UnifiedInferenceClient.create(embedded=True, default_llm_model=str(default_model_path)) as here:
        assert here.chat("Name three colours.", **options).text == expected


def test_nothing_is_left_behind() -> None:
    """After closing, no thread of the client or of an embedded engine is left, and closing twice is fine."""
    before = set(threading.enumerate())
    client = UnifiedInferenceClient.create(embedded=True, mock=True)
    assert client.chat("hi", max_tokens=2).text
    client.close()
    client.close()
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        for thread in left:
            thread.join(0.1)
    # A pool of the event loop's default executor may idle on; it holds nothing and ends with the process.
    assert not [t for t in left if t.name.startswith("sagellm")]


def test_many_threads_share_a_client(mock_server: Any) -> None:
    """Sixteen threads get their own answers from one client."""
    with UnifiedInferenceClient(mock_server.base_url) as client, ThreadPoolExecutor(16) as pool:

        def ask(k: int) -> str:
            return client.chat(f"number {k % 4}", max_tokens=12, temperature=0).text

        answers = list(pool.map(ask, range(32)))
    assert all(answers[k] == answers[k % 4] for k in range(32))


def test_a_busy_server_is_asked_again_when_it_says(scripted: Callable[..., ScriptedServer]) -> None:
    """429 and 503 are retried after Retry-After, and the answer arrives."""
    server = scripted(
        [
            error_reply(429, "resource_exhausted", {"retry-after": "0.15"}),
            error_reply(503, "unavailable"),
            chat_reply("at last"),
        ]
    )
    with UnifiedInferenceClient(server.url, retries=QUICK) as client:
        started = time.monotonic()
        assert client.chat("hi").text == "at last"
        assert time.monotonic() - started >= 0.15
    assert len(server.requests) == 3


def test_retries_end_with_what_the_server_said(scripted: Callable[..., ScriptedServer]) -> None:
    """After the last attempt the server's own error is raised, with its code."""
    server = scripted([error_reply(429, "resource_exhausted") for _ in range(3)])
    with (
        UnifiedInferenceClient(server.url, retries=QUICK) as client,
        pytest.raises(ResourceExhaustedError, match="scripted 429"),
    ):
        client.chat("hi")


def test_a_request_that_is_wrong_is_not_sent_again(scripted: Callable[..., ScriptedServer]) -> None:
    """A 4xx is final."""
    server = scripted([error_reply(400, "invalid_argument")])
    with UnifiedInferenceClient(server.url, retries=QUICK) as client, pytest.raises(InvalidArgumentError):
        client.chat("hi")
    assert len(server.requests) == 1


def test_a_broken_stream_goes_on_where_it_stood(scripted: Callable[..., ScriptedServer]) -> None:
    """A connection that is cut in the middle is taken up again with the same seed; no text is lost or repeated."""
    words = ["The ", "quick ", "brown ", "fox"]
    server = scripted([stream_reply(words[:2], whole=False), stream_reply(words, whole=True)])
    with UnifiedInferenceClient(server.url, retries=QUICK) as client:
        assert "".join(map(str, client.chat("hi", stream=True))) == "The quick brown fox"
    assert server.requests[0]["seed"] == server.requests[1]["seed"]


def test_a_replay_that_differs_is_not_passed_off_as_the_same(scripted: Callable[..., ScriptedServer]) -> None:
    """When the replay says something else, the break is reported instead of a mixture."""
    server = scripted([stream_reply(["The ", "quick "], whole=False), stream_reply(["A ", "slow ", "dog"], whole=True)])
    with UnifiedInferenceClient(server.url, retries=QUICK) as client, pytest.raises(UnavailableError, match="replay"):
        list(client.chat("hi", stream=True))


def test_silence_is_a_deadline(scripted: Callable[..., ScriptedServer]) -> None:
    """A server that never answers ends in DeadlineExceededError after the timeout."""
    release = threading.Event()
    server = scripted([lambda _: release.wait(5)])
    with (
        UnifiedInferenceClient(server.url, timeout=Timeouts(total=0.2)) as client,
        pytest.raises(DeadlineExceededError),
    ):
        client.chat("hi", model="scripted")
    release.set()


def test_the_timeout_holds_in_process_too() -> None:
    """An embedded engine that takes too long ends in DeadlineExceededError, whole and streamed, and serves on."""
    slow: Any = {"mock": {"scale": 20}}
    timeouts = Timeouts(total=0.3, between_events=5)
    with UnifiedInferenceClient.create(embedded=True, mock=True, engine=slow, timeout=timeouts) as client:
        with pytest.raises(DeadlineExceededError):
            client.chat("hi", max_tokens=50, temperature=0)
        assert len(list(client.chat("hi", max_tokens=3, temperature=0, stream=True))) > 0


def test_nobody_there_is_said_with_the_cure() -> None:
    """A refused connection names the address and the command that starts a server."""
    with (
        UnifiedInferenceClient("http://127.0.0.1:9/v1", retries=RetryPolicy(attempts=1)) as client,
        pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9.*sage-llm serve"),
    ):
        client.chat("hi")


def test_an_unknown_model_is_our_error(mock_server: Any) -> None:
    """The server's 404 becomes ModelNotFoundError."""
    with UnifiedInferenceClient(mock_server.base_url) as client, pytest.raises(ModelNotFoundError, match="nonesuch"):
        client.chat("hi", model="nonesuch")


def test_an_embedding_server_is_never_taken_for_a_chat_server(
    scripted: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discovery asks each port what it serves: the embedding server on the first port is passed over."""
    for name in ("SAGE_UNIFIED_BASE_URL", "SAGE_CHAT_BASE_URL", "SAGE_EMBEDDING_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    embedding = scripted([], models=[{"id": "all-minilm-l6-v2"}])
    declared = scripted([], models=[{"id": "vectors", "kind": "embedding"}])
    chat = scripted([chat_reply("from the chat server")])
    monkeypatch.setattr(discovery, "CHAT_PORTS", (embedding.port, declared.port, chat.port))
    monkeypatch.setattr(discovery, "EMBEDDING_PORTS", (chat.port,))
    with UnifiedInferenceClient.create() as client:
        assert client.chat("hi").text == "from the chat server"
        assert client.get_status()["embedding_base_url"] == embedding.url
    monkeypatch.setattr(discovery, "CHAT_PORTS", (embedding.port,))
    with UnifiedInferenceClient.create() as client:
        assert not client.is_llm_available
        assert client.is_llm_available() is False
        with pytest.raises(UnavailableError, match=r"serves all-minilm-l6-v2.*sage-llm serve"):
            client.chat("hi")


def test_a_server_that_wants_a_key_is_said_with_what_to_pass(
    start_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Discovery does not pass a locked server over in silence: the error names its address, and both ways to give a key."""
    for name in ("SAGE_UNIFIED_BASE_URL", "SAGE_CHAT_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    server = start_server("--mock", "--require-key", "--state", str(tmp_path / "state.sqlite"))
    monkeypatch.setattr(discovery, "CHAT_PORTS", (int(server.root_url.rpartition(":")[2]),))
    with UnifiedInferenceClient.create() as client:
        says = f"pass api_key, or set SAGE_UNIFIED_BASE_URL={server.base_url} and SAGE_UNIFIED_API_KEY"
        with pytest.raises(UnauthenticatedError, match=says):
            client.chat("hi")


def test_the_environment_says_where(scripted: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """SAGE_UNIFIED_BASE_URL and _MODEL are used before any port is probed."""
    server = scripted([chat_reply("ok")])
    monkeypatch.setenv("SAGE_UNIFIED_BASE_URL", server.url)
    monkeypatch.setenv("SAGE_UNIFIED_MODEL", "named")
    with UnifiedInferenceClient.create() as client:
        assert client.chat("hi").text == "ok"
    assert server.requests[0]["model"] == "named"


def test_vectors_come_in_order_from_both_encodings(scripted: Callable[..., ScriptedServer]) -> None:
    """`embed` gives lists of floats in input order, whether the server sent lists or base64."""
    packed = base64.b64encode(struct.pack("<2f", 1.5, -2.0)).decode()
    rows = [{"index": 1, "embedding": packed}, {"index": 0, "embedding": [0.5, 0.25]}]
    server = scripted(
        [lambda handler: send_json(handler, 200, {"data": rows})], models=[{"id": "m", "kind": "embedding"}]
    )
    with UnifiedInferenceClient(server.url) as client:
        assert client.embed(["a", "b"]).vectors == [[0.5, 0.25], [1.5, -2.0]]


@pytest.mark.model
def test_an_embedding_model_beside_a_chat_model(minilm_model_path: Any) -> None:
    """`embed` finds the embedding model among what is loaded, and likeness shows in the vectors."""
    with UnifiedInferenceClient.create(
        embedded=True, default_llm_model="mock", default_embedding_model=str(minilm_model_path)
    ) as client:
        cat, dog, stocks = client.embed(["a cat", "a dog", "the stock market"]).vectors

    def likeness(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert len(cat) == 384
    assert likeness(cat, dog) > 0.4 > likeness(cat, stocks)


def test_wrong_combinations_are_refused_by_name() -> None:
    """What contradicts itself is refused, with the parameter that is at fault."""
    for options, param in (
        ({"embedded": True, "base_url": "http://x/v1"}, "embedded"),
        ({"engine": {"limits": {}}}, "engine"),
        ({"mock": True}, "mock"),
        ({"embedded": True, "api_key": "x"}, "api_key"),
        ({"embedded": True, "retries": RetryPolicy()}, "retries"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            UnifiedInferenceClient(**options)  # type: ignore[arg-type]
        assert caught.value.param == param


@dataclass
class City:
    name: str
    people: int


def test_a_dataclass_asks_for_itself_and_comes_back(scripted: Callable[..., ScriptedServer]) -> None:
    """A dataclass as response_format becomes a strict JSON schema, and the reply an instance of it."""
    server = scripted([chat_reply('{"name": "Paris", "people": 2100000}'), chat_reply('{"name": "Par')])
    with UnifiedInferenceClient(server.url) as client:
        assert client.chat("hi", response_format=City).parsed == City("Paris", 2100000)
        schema = server.requests[0]["response_format"]["json_schema"]
        assert schema["strict"] is True
        assert schema["schema"]["required"] == ["name", "people"]
        with pytest.raises(InvalidArgumentError, match="max_tokens"):
            client.chat("hi", response_format=City)


def test_json_formats_are_taken_as_they_are() -> None:
    """A dict is sent unchanged and parsed as plain JSON."""
    assert response_format_of({"type": "json_object"}) == {"type": "json_object"}
    assert parse_output({"type": "json_object"}, '{"a": 1}') == {"a": 1}


def test_a_function_is_a_tool() -> None:
    """Name, docstring, annotations and defaults of a function become a tool definition."""

    def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
        """Say how warm it is."""
        return city + unit

    (tool,) = tools_of([weather])
    assert tool["function"]["name"] == "weather"
    assert tool["function"]["description"] == "Say how warm it is."
    assert tool["function"]["parameters"]["required"] == ["city"]
    assert tool["function"]["parameters"]["properties"]["unit"]["enum"] == ["C", "F"]

    def sprawling(*places: str) -> None:
        """No."""

    with pytest.raises(InvalidArgumentError, match="places"):
        tools_of([sprawling])


def test_a_model_that_is_served_is_not_started_again(mock_server: Any) -> None:
    """`create_for_model` returns at once for a model that is served, and says when the store has no such model."""
    with UnifiedInferenceClient.create_for_model("mock", mock_server.root_url) as client:
        assert client.chat("hi", max_tokens=2).model == "mock"
    with pytest.raises(ModelNotFoundError):
        UnifiedInferenceClient.create_for_model("nonesuch:7b", mock_server.root_url)


def test_results_of_odd_servers_do_not_break() -> None:
    """Missing fields read as empty."""
    assert ChatResult({}).text == ""
    assert ChatResult({"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]}).tool_calls == [
        {"id": "1"}
    ]
    assert Delta({"choices": []}).text == ""
    assert Delta({"choices": [{"delta": None}]}).text == ""
