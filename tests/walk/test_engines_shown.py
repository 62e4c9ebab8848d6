"""What an operator sees of the engines: over HTTP, in the metrics, and in their logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import httpx2
import pytest


def test_each_engine_is_shown_with_its_process_load_and_kv(start_server, tmp_path):
    """`serve --engines 2` lists both with pid, state, load and KV use; a stream shows on one of them; its log is printed by `sage-llm logs`."""
    env = {"XDG_STATE_HOME": str(tmp_path)}
    server = start_server("--mock", "--engines", "2", env=env)
    body = {
        "model": "mock", "messages": [{"role": "user", "content": "hello " * 40}], "max_tokens": 400, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    with httpx2.Client(base_url=server.base_url.removesuffix("/v1"), timeout=30, trust_env=False) as http:
        engines = http.get("/v1/management/engines").json()["engines"]
        assert len(engines) == 2
        for engine in engines:
            os.kill(engine["pid"], 0)  # raises if there is no such process
            assert engine["state"] == "READY"
            assert engine["kv_blocks_total"] > 0
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            shown = http.get("/v1/management/engines").json()["engines"]
            assert sorted(e["active_requests"] for e in shown) == [0, 1]
            page = http.get("/metrics").text
            running = [line for line in page.splitlines() if line.startswith("sagellm_engine_running{")]
            assert sorted(float(line.rpartition(" ")[2]) for line in running) == [0.0, 1.0]
        assert 'sagellm_added_seconds_bucket{le="+Inf"} 1.0' in http.get("/metrics").text
        over_http = http.get(f"/v1/management/engines/{engines[0]['engine_id']}/logs").json()["lines"]
    command = [sys.executable, "-m", "sagellm", "logs", engines[0]["engine_id"]]
    printed = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=True)
    assert over_http
    assert over_http[-1] in printed.stdout, json.dumps(over_http)


def test_engines_have_the_roles_that_they_were_started_with(start_server, tmp_path):
    """`serve --pd-separation --role` and `engine start --role` say what an engine is for: one for prefill gets no whole request."""
    flags = ("--engines", "2", "--pd-separation", "--role", "prefill", "--role", "decode")
    server = start_server("--mock", *flags, env={"XDG_STATE_HOME": str(tmp_path)})
    command = [sys.executable, "-m", "sagellm", "engine", "start", "mock", "--id", "third", "--role", "decode"]
    subprocess.run([*command, "--url", server.base_url], capture_output=True, timeout=60, check=True)
    with httpx2.Client(base_url=server.base_url.removesuffix("/v1"), timeout=60, trust_env=False) as http:
        engines = http.get("/v1/management/engines").json()["engines"]
        assert {e["engine_id"]: e["metadata"]["role"] for e in engines} == {
            "mock-1": "prefill", "mock-2": "decode", "third": "decode"
        }  # fmt: skip
        body = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        for _ in range(4):
            assert http.post("/v1/chat/completions", json=body).status_code == 200
        served = {e["engine_id"]: e["total_requests"] for e in http.get("/v1/management/engines").json()["engines"]}
    assert served["mock-1"] == 0  # a short prompt is not worth a hand-over
    assert served["mock-2"] + served["third"] == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--role", "prefill"], "add it"),
        (["--pd-separation", "--engines", "3", "--role", "prefill", "--role", "decode"], "2 times for 3 engines"),
        (["--pd-separation", "--engines", "1", "--role", "both"], "any, prefill, decode"),
    ],
)
def test_roles_without_effect_are_refused(capsys, flags, said):
    """Roles that nothing heeds, that are not one for each engine, or that do not exist are refused with the cure."""
    from sagellm.cli.main import main

    assert main(["serve", "--mock", "--port", "0", *flags]) == 1
    assert said in capsys.readouterr().err
