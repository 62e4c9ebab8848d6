"""Answers in one piece over engines that die: they are streams within, so they go on elsewhere as well."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

BODY = {"max_tokens": 300, "temperature": 1.0, "seed": 7, "ignore_eos": True, "model": "mock"}
CHAT = ("/v1/chat/completions", {**BODY, "messages": [{"role": "user", "content": "hello"}]})
TEXT = ("/v1/completions", {**BODY, "prompt": "hello"})


def answer(http: httpx2.Client, path: str, body: dict) -> tuple[str, int]:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    said = reply.json()
    choice = said["choices"][0]
    return choice.get("text") or choice["message"]["content"], said["usage"]["completion_tokens"]


@pytest.mark.parametrize(("path", "body"), [CHAT, TEXT])
def test_an_answer_in_one_piece_survives_its_engine(start_server, tmp_path, path, body):
    """Four whole answers are under way when the engine of two of them is killed: all four are what they are undisturbed."""
    server = start_server("--mock", "--engines", "2", "--routing", "round_robin", env={"XDG_STATE_HOME": str(tmp_path)})
    with httpx2.Client(base_url=server.base_url.removesuffix("/v1"), timeout=60, trust_env=False) as http:
        expected = answer(http, path, body)
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(answer, http, path, body) for _ in range(4)]
            busy = wait_for_two(http)
            os.kill(busy["pid"], signal.SIGKILL)
            assert [job.result() for job in jobs] == [expected] * 4
        moved = http.get("/v1/management/status").json()["scheduling"]
        assert moved["migrations"] + moved["retries"] >= 2


def wait_for_two(http: httpx2.Client) -> dict:
    """Return an engine that runs two requests, once there is one."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for engine in http.get("/v1/management/engines").json()["engines"]:
            if engine["active_requests"] == 2:
                return engine
    raise AssertionError("no engine ever ran two requests")
