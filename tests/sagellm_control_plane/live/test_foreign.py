from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from sagellm_control_plane.config import CoreConfig, HealthConfig
from sagellm_control_plane.live.foreign import foreign_engine
from sagellm_control_plane.live.foreign_wire import StreamReader, parse_load, request_body
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.types import EngineState
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError
from sagellm_protocol.generation import ChatMessage, ChoiceDelta, FunctionSpec, GenerationEnd, GenerationRequest
from sagellm_protocol.sampling import GrammarSpec, SamplingParams
from sagellm_protocol.types import Request


class Server:
    """A minimal OpenAI-compatible server: streams `pieces`, may break off after some of them."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.break_after: int | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.bodies: list[dict] = []
        self.gone = asyncio.Event()
        self.metrics = ""
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.reply(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone.set()
        finally:
            writer.close()

    async def reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        length = next((int(x.split(":")[1]) for x in head.splitlines() if x.lower().startswith("content-length")), 0)
        body = json.loads(await reader.readexactly(length)) if length else None
        if body is not None:
            self.bodies.append(body)
        if path == "/v1/models":
            await self.send(writer, json.dumps({"data": [{"id": "theirs", "max_model_len": 2048}]}))
        elif path == "/metrics" and self.metrics:
            await self.send(writer, self.metrics)
        elif path == "/v1/embeddings":
            rows = [{"index": i, "embedding": [float(len(t)), 1.0]} for i, t in enumerate(body["input"])]
            await self.send(writer, json.dumps({"data": rows, "usage": {"prompt_tokens": 7}}))
        elif path.endswith("/completions"):
            await self.stream(writer, body, chat="chat" in path)
        else:
            await self.send(writer, '{"error": {"message": "no such path"}}', "404 Not Found")

    async def send(self, writer: asyncio.StreamWriter, text: str, status: str = "200 OK") -> None:
        data = text.encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()

    async def stream(self, writer: asyncio.StreamWriter, body: dict, *, chat: bool) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        already = 0
        if chat and body.get("continue_final_message"):
            already = len(body["messages"][-1]["content"].split()) if body["messages"][-1]["role"] == "assistant" else 0
        for count, piece in enumerate(self.pieces[already:]):
            if count == self.break_after:
                return
            choice = {"index": 0, "delta": {"content": piece}} if chat else {"index": 0, "text": piece}
            writer.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            await writer.drain()
            await self.hold.wait()
        last = {"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}
        writer.write(f"data: {json.dumps({'choices': [last]})}\n\n".encode())
        usage = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
        writer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        await writer.drain()


@asynccontextmanager
async def serving(*servers: Server, metadata: dict | None = None):
    config = CoreConfig(health=HealthConfig(interval_s=0.02, timeout_s=1.0))
    manager = ControlPlaneManager(config=config, seed=1)
    await manager.start()
    listeners = []
    try:
        for i, server in enumerate(servers):
            listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
            listeners.append(listener)
            server.port = listener.sockets[0].getsockname()[1]
            manager.register_engine(
                f"f{i}", "model", "127.0.0.1", server.port, metadata={"served_model": "theirs", **(metadata or {})}
            )
        await until(lambda: all(e.state is EngineState.READY for e in manager.list_engines()))
        yield manager
    finally:
        await manager.stop()
        for listener in listeners:
            listener.close()
            await listener.wait_closed()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - pytest's timeout bounds the wait
        await asyncio.sleep(0.002)


def ask(**more) -> GenerationRequest:
    return GenerationRequest(request_id="r", model="model", messages=(ChatMessage(role="user", content="hi"),), **more)


async def text_of(manager: ControlPlaneManager, request: GenerationRequest) -> str:
    return "".join([e.text async for e in manager.generate(request) if isinstance(e, ChoiceDelta)])


async def test_an_engine_registered_by_address_becomes_ready_and_serves():
    """A foreign engine is READY after a probe, streams chat, and its usage is the server's."""
    server = Server(["one ", "two ", "three"])
    async with serving(server) as manager:
        assert manager.get_engine_info("f0").is_healthy
        events = [e async for e in manager.generate(ask(sampling=SamplingParams(temperature=0.5, seed=3)))]
        assert "".join(e.text for e in events if isinstance(e, ChoiceDelta)) == "one two three"
        end = events[-1]
        assert isinstance(end, GenerationEnd)
        assert (end.usage.prompt_tokens, end.usage.completion_tokens, end.usage.cached_tokens) == (11, 3, 4)
        assert server.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
        assert (server.bodies[0]["temperature"], server.bodies[0]["seed"], server.bodies[0]["model"]) == (
            0.5,
            3,
            "theirs",
        )


def test_the_same_under_uvloop():
    """The HTTP client does not depend on which event loop runs it."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with serving(Server(["one ", "two"])) as manager:
            assert await text_of(manager, ask()) == "one two"

    uvloop.run(main())


async def test_a_long_beginning_is_known_by_its_text():
    """The next turn of a conversation goes to the engine that had the turns before, by the text of the prompt: 128 estimated tokens a block."""
    first, second = Server(["a"]), Server(["b"])
    turns = tuple(ChatMessage(role=role, content=role * 400) for role in ("user", "assistant"))
    async with serving(first, second) as manager:
        for k in range(1, 5):
            request = GenerationRequest(request_id=f"r{k}", model="model", messages=turns * k)
            await text_of(manager, request)
        assert sorted((len(first.bodies), len(second.bodies))) == [0, 4]
        stats = manager._state.stats
        # Each turn but the first finds all full blocks of the one before it.
        sizes = [len("\x1e".join(f"{m.role}\x1f{m.content}" for m in turns * k).encode()) for k in range(1, 4)]
        assert stats.hit_tokens == sum(size // 512 * 128 for size in sizes)


async def test_prompts_v01_requests_and_embeddings_pass_through():
    """Completions, protocol v0.1 and embeddings reach a foreign engine."""
    server = Server(["one ", "two"])
    async with serving(server) as manager:
        request = Request(request_id="v", trace_id="t", model="model", prompt="say", max_tokens=5)
        response = await manager.execute_request(request)
        assert (response.output_text, response.finish_reason, response.prompt_tokens) == ("one two", "stop", 11)
        assert server.bodies[0]["prompt"] == "say"
        assert await manager.get_embeddings(["ab", "abcd"], "model") == [[2.0, 1.0], [4.0, 1.0]]


async def test_a_broken_chat_stream_goes_on_where_the_server_can_continue():
    """VLLM and SGLang continue an unfinished assistant message: the reader sees the whole text once."""
    pieces = [f"w{i} " for i in range(8)]
    first, second = Server(pieces), Server(pieces)
    first.break_after = 3
    async with serving(first, second, metadata={"flavour": "vllm"}) as manager:
        for i in range(4):
            request = GenerationRequest(
                request_id=f"r{i}", model="model", messages=(ChatMessage(role="user", content=f"hi {i}"),)
            )
            assert await text_of(manager, request) == "".join(pieces)
    resumed = [b for b in second.bodies if b.get("continue_final_message")]
    assert resumed
    assert resumed[0]["messages"][-1] == {"role": "assistant", "content": "w0 w1 w2 "}


async def test_a_reader_that_goes_away_closes_the_connection():
    """Closing the generator closes the connection, which is how such servers abort."""
    server = Server(["x" * 10_000] * 5000)
    async with serving(server) as manager:
        async with aclosing(manager.generate(ask())) as events:
            async for event in events:
                if isinstance(event, ChoiceDelta):
                    break
        await asyncio.wait_for(server.gone.wait(), 5)
        assert manager._state.ledger.open == 0


@pytest.mark.parametrize("ends", [True, False])
async def test_a_connection_is_kept_unless_its_answer_never_ends(monkeypatch, ends):
    """The end of the reply may come after its last event: the connection serves again; one that never ends is closed after a moment."""
    monkeypatch.setattr("sagellm_control_plane.live.http1.LINGER_S", 0.05)
    connections, gone = [], asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                if "post" not in head:
                    body = b'{"data": [{"id": "theirs"}]}'
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                    continue
                await reader.readexactly(int(head.split("content-length:")[1].split()[0]))
                event = b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
                chunk = b"%x\r\n" % len(event) + event + b"\r\n"
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk)
                await writer.drain()
                await asyncio.sleep(0)
                if ends:
                    writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            gone.set()
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    client, _chat = foreign_engine("f", "theirs", "127.0.0.1", listener.sockets[0].getsockname()[1], {})
    try:
        for _ in range(3):
            request = EngineRequest(request_id="r", prompt_token_ids=(0,), sampling=SamplingParams(), source=ask())
            assert "".join([d.text or "" async for d in client.stream(request)]) == "x"
            await asyncio.sleep(0.02)
        if ends:
            assert len(connections) == 1
        else:
            await asyncio.wait_for(gone.wait(), 5)
            assert len(connections) == 3
    finally:
        await client.close()
        listener.close()
        await listener.wait_closed()


async def test_load_comes_from_the_engines_metrics():
    """VLLM's gauges are the engine's load; a server without them is asked for its models only."""
    server = Server([])
    server.metrics = 'vllm:num_requests_running{m="a"} 3.0\nvllm:num_requests_waiting{m="a"} 2.0\n'
    async with serving(server) as manager:
        engine = manager._dispatcher.registry.get("f0")
        await until(lambda: engine.status is not None)
        assert (engine.status.running, engine.status.waiting) == (3, 2)


def test_what_a_server_cannot_do_is_refused_by_name():
    """Fields beyond OpenAI's go to servers that know them; elsewhere they are refused, never dropped."""
    request = EngineRequest(request_id="r", prompt_token_ids=(0,), sampling=SamplingParams(top_k=5), source=ask())
    assert request_body(request, "m", "vllm")[1]["top_k"] == 5
    with pytest.raises(UnsupportedError, match="top_k"):
        request_body(request, "m", "openai")
    lark = EngineRequest(
        request_id="r",
        prompt_token_ids=(0,),
        sampling=SamplingParams(grammar=GrammarSpec(kind="lark", source="x")),
        source=ask(),
    )
    with pytest.raises(UnsupportedError, match="grammar"):
        request_body(lark, "m", "vllm")
    tools = ask(tools=(FunctionSpec(name="f", parameters={"type": "object"}),), tool_choice="f")
    body = request_body(
        EngineRequest(request_id="r", prompt_token_ids=(0,), sampling=SamplingParams(), source=tools), "m", "openai"
    )[1]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}


def test_tool_calls_and_reasoning_are_read_from_the_stream():
    """Deltas carry reasoning and tool calls as the server split them; the last one waits for the usage."""
    reader = StreamReader("r", chat=True)
    lines = [
        '{"choices":[{"delta":{"role":"assistant","reasoning_content":"hm"}}]}',
        '{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":""}}]}}]}',
        '{"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}]},"finish_reason":"tool_calls"}]}',
        '{"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":1}}',
        "[DONE]",
    ]
    deltas = [d for line in lines for d in reader.take(f"data: {line}\n\n".encode())]
    assert deltas[0].reasoning == "hm"
    assert (deltas[1].tool_calls[0].name, deltas[2].tool_calls[0].arguments) == ("f", "{}")
    assert (deltas[3].finish_reason, deltas[3].usage.prompt_tokens) == ("tool_calls", 2)


def test_metrics_pages_are_read_by_name():
    """Labels are summed, NaN and foreign lines are left out."""
    page = '# HELP x\nllamacpp:requests_processing 2\nsglang:token_usage{a="b"} NaN\nother 5\n'
    assert parse_load(page) == {"running": 2.0}


async def test_metadata_that_means_nothing_is_refused():
    """An unknown key or flavour is an error that lists the known ones, and nothing stays registered."""
    manager = ControlPlaneManager()
    with pytest.raises(InvalidArgumentError, match="flavour"):
        manager.register_engine("a", "m", "127.0.0.1", 1, metadata={"flavour": "weird"})
    with pytest.raises(InvalidArgumentError, match="colour"):
        manager.register_engine("a", "m", "127.0.0.1", 1, metadata={"colour": "red"})
    assert manager.list_engines() == []
    await manager.stop()
