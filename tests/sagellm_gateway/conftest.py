from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, ClassVar

import httpx2
import pytest

from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_core.local import LocalEngine
from sagellm_core.testing import mock_engine
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_gateway.config import GatewayConfig, Timeouts
from sagellm_gateway.server import create_app
from sagellm_gateway.testing import Running, running
from sagellm_protocol.errors import ContextLengthError, ModelNotFoundError
from sagellm_protocol.generation import (
    ChoiceDelta,
    GenerationEnd,
    GenerationRequest,
    GenerationStart,
    TokenLogprob,
    Usage,
)


class WordChatModel:
    """One token a character; enough text side for routes that need one."""

    model_id = "tiny"
    context_length = 512
    sampling_defaults: ClassVar[dict[str, float]] = {}

    def tokenize(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        return list(text.encode())

    def detokenize(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")


Script = Callable[[GenerationRequest], AsyncGenerator[Any, None]]


class ScriptedManager:
    """A control plane's data path that says what `script` yields; counts what is open."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.open = 0
        self.closed = asyncio.Event
        self.script: Script = self.say("Hello", ", ", "world")

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def list_models(self) -> list[str]:
        return ["tiny"]

    def chat_model(self, model_id: str) -> WordChatModel:
        if model_id != "tiny":
            raise ModelNotFoundError(f"the model {model_id!r} is not served here", param="model")
        return WordChatModel()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Any, None]:
        self.chat_model(request.model)
        size = sum(len(m.content or "") for m in request.messages or ()) + len(request.prompt or ())
        if size > 512:
            raise ContextLengthError(f"the prompt has {size} tokens, the context window holds 512", param="messages")
        self.requests.append(request)
        self.open += 1
        try:
            async for event in self.script(request):
                yield event
        finally:
            self.open -= 1

    @staticmethod
    def say(*texts: str, finish: str = "stop", **more: Any) -> Script:
        async def script(request: GenerationRequest) -> AsyncGenerator[Any, None]:
            yield GenerationStart(request_id=request.request_id, model=request.model, prompt_tokens=7)
            for i in range(request.n):
                for text in texts:
                    logprobs = None
                    if request.sampling.logprobs is not None:
                        top = TokenLogprob(token_id=2, logprob=float("-inf"), text="x", data=b"x")
                        logprobs = (TokenLogprob(token_id=1, logprob=-0.5, text=text, data=text.encode(), top=(top,)),)
                    yield ChoiceDelta(index=i, text=text, token_ids=(1,), logprobs=logprobs)
                yield ChoiceDelta(index=i, finish_reason=finish, **more)
            yield GenerationEnd(usage=Usage(prompt_tokens=7, completion_tokens=len(texts) * request.n), ttft_s=0.01)

        return script

    @staticmethod
    def events(*events: Any, then: Exception | None = None, wait: bool = False) -> Script:
        async def script(request: GenerationRequest) -> AsyncGenerator[Any, None]:
            yield GenerationStart(request_id=request.request_id, model=request.model, prompt_tokens=7)
            for event in events:
                yield event
            if wait:
                await asyncio.Event().wait()
            if then is not None:
                raise then
            yield GenerationEnd(usage=Usage(prompt_tokens=7, completion_tokens=len(events)))

        return script


@pytest.fixture(scope="session")
def gateway_server() -> Iterator[tuple[Running, ScriptedManager]]:
    manager = ScriptedManager()
    config = GatewayConfig(timeouts=Timeouts(first_ping=0.2, ping=0.2, header=1.0, body=1.0))
    with running(create_app(manager, config)) as server:  # type: ignore[arg-type]
        yield server, manager


@pytest.fixture
def manager(gateway_server: tuple[Running, ScriptedManager]) -> ScriptedManager:
    manager = gateway_server[1]
    manager.requests.clear()
    manager.script = manager.say("Hello", ", ", "world")
    return manager


@pytest.fixture
def server(gateway_server: tuple[Running, ScriptedManager], manager: ScriptedManager) -> Running:
    return gateway_server[0]


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=10, trust_env=False) as client:
        yield client


class Stack:
    """The real control plane and engine over the simulated device, behind the gateway."""

    def __init__(self) -> None:
        self.manager = ControlPlaneManager(mode="local")
        self.engine = LocalEngine(mock_engine())
        start = self.manager.start

        async def start_with_engine() -> None:
            await start()
            await self.manager.add_engine(self.engine, ByteChatModel("mock", 2048))

        self.manager.start = start_with_engine  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def stack_server() -> Iterator[tuple[Stack, Running]]:
    stack = Stack()
    with running(create_app(stack.manager)) as server:
        yield stack, server


@pytest.fixture
def stack_http(stack_server: tuple[Stack, Running]) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack_server[1].url, timeout=20, trust_env=False) as client:
        yield client
