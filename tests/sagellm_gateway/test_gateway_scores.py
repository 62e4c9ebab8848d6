"""Scores through HTTP are those of the engine: what an evaluation harness would compute is the same either way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_core.build import build_engine
from sagellm_core.config import EngineConfig, Limits
from sagellm_core.local import LocalEngine
from sagellm_core.text import load_chat_model
from sagellm_gateway.server import create_app
from sagellm_gateway.testing import running
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams

pytestmark = pytest.mark.model

# A multiple-choice item: question, answers, the right one.
ITEMS = [
    ("The capital of France is", [" Paris", " Berlin", " Madrid"], 0),
    ("Water freezes at zero degrees", [" Celsius", " Fahrenheit", " Kelvin"], 0),
    ("The opposite of hot is", [" cold", " warm", " red"], 0),
]


@pytest.fixture(scope="module")
def real(default_model_path: Path) -> Iterator[tuple[LocalEngine, Any, httpx2.Client]]:
    """The default model in this process: the engine itself, and the gateway over it."""
    config = EngineConfig(model=str(default_model_path), model_id="tiny", limits=Limits(n_ctx=512))
    engine = LocalEngine(build_engine(config))
    text = load_chat_model(default_model_path, "tiny", 512)
    manager = ControlPlaneManager(mode="local")
    start = manager.start

    async def start_with_engine() -> None:
        await start()
        await manager.add_engine(engine, text)

    manager.start = start_with_engine  # type: ignore[method-assign]
    with (
        running(create_app(manager)) as server,
        httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as http,
    ):
        yield engine, text, http


async def in_process(engine: LocalEngine, prompt: tuple[int, ...]) -> list[float]:
    request = EngineRequest(
        request_id=f"score-{hash(prompt)}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0, max_tokens=1, seed=0, prompt_logprobs=0),
    )
    async for delta in engine.stream(request):
        if delta.prompt_logprobs is not None:
            return [entry.logprob for entry in delta.prompt_logprobs if entry is not None]
    raise AssertionError("no log-probabilities came")


def test_loglikelihood_through_http_is_the_engines(real: tuple[LocalEngine, Any, httpx2.Client]) -> None:
    """Summed log-probabilities of answers, by token prompts with echo, equal the in-process ones to 1e-3 and pick the same."""
    engine, text, http = real
    for question, answers, right in ITEMS:
        context = http.post("/tokenize", json={"model": "tiny", "prompt": question}).json()["tokens"]
        assert context == text.tokenize(question)
        sums: list[tuple[float, float]] = []
        for answer in answers:
            whole = text.tokenize(question + answer)
            body = {"model": "tiny", "prompt": whole, "echo": True, "max_tokens": 0, "logprobs": 1, "temperature": 0}
            choice = http.post("/v1/completions", json=body).json()["choices"][0]
            over_http = choice["logprobs"]["token_logprobs"][len(context) :]
            direct = asyncio.run(in_process(engine, tuple(whole)))[len(context) - 1 :]
            assert len(over_http) == len(direct) > 0
            sums.append((sum(over_http), sum(direct)))
        assert all(abs(a - b) < 1e-3 for a, b in sums)
        assert max(range(len(sums)), key=lambda i: sums[i][0]) == right


def test_generation_through_http_is_the_engines(real: tuple[LocalEngine, Any, httpx2.Client]) -> None:
    """Greedy text is the same through completions, streamed completions, and the engine itself."""
    engine, text, http = real
    prompt = "Once upon a time"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    over_http = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    streamed = http.post("/v1/completions", json={**body, "stream": True}).text
    parts = [json.loads(b[6:]) for b in streamed.split("\n\n") if b.startswith("data: {")]
    assert "".join(p["choices"][0]["text"] for p in parts) == over_http

    async def direct() -> list[int]:
        ids: list[int] = []
        request = EngineRequest(
            request_id="direct",
            prompt_token_ids=tuple(text.tokenize(prompt)),
            sampling=SamplingParams(temperature=0, max_tokens=24, seed=0),
            eos_token_ids=(0, 2),
        )
        async for delta in engine.stream(request):
            ids += delta.token_ids
        return ids

    assert text.detokenize(asyncio.run(direct()), skip_special_tokens=True) == over_http
