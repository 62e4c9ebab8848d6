from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.config import GatewayConfig, Limits
from sagellm_gateway.errors import HttpError
from sagellm_gateway.multipart import parse
from sagellm_gateway.server import create_app
from sagellm_gateway.testing import running
from sagellm_protocol.errors import UnavailableError
from sagellm_protocol.generation import Priority


def lines(count: int, **change: Any) -> bytes:
    rows = []
    for i in range(count):
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"Hi {i}"}]}
        rows.append({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body, **change})
    return "\n".join(json.dumps(row) for row in rows).encode()


def upload(http: httpx2.Client, content: bytes, purpose: str = "batch") -> dict[str, Any]:
    answer = http.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": purpose})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def start(http: httpx2.Client, file_id: str) -> dict[str, Any]:
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    answer = http.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def wait(http: httpx2.Client, batch_id: str, *states: str) -> dict[str, Any]:
    end = time.monotonic() + 20
    while True:
        batch: dict[str, Any] = http.get(f"/v1/batches/{batch_id}").json()
        if batch["status"] in states:
            return batch
        assert time.monotonic() < end, batch
        time.sleep(0.02)


def content(http: httpx2.Client, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in http.get(f"/v1/files/{file_id}/content").text.splitlines()]


def test_file_lives_its_life(http: httpx2.Client) -> None:
    """Upload, list, read, delete; a file that is gone is a 404; bad forms are 4xx."""
    made = upload(http, b"x\r\n--not-the-boundary\r\ny")
    assert (made["bytes"], made["filename"]) == (24, "in.jsonl")
    assert made["id"] in [f["id"] for f in http.get("/v1/files").json()["data"]]
    assert http.get(f"/v1/files/{made['id']}/content").content == b"x\r\n--not-the-boundary\r\ny"
    assert http.delete(f"/v1/files/{made['id']}").json()["deleted"] is True
    assert http.get(f"/v1/files/{made['id']}").status_code == 404
    assert http.post("/v1/files", json={}).status_code == 415
    assert http.post("/v1/files", data={"purpose": "batch"}).status_code in (400, 415)
    nothing = http.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "mischief"})
    assert nothing.json()["error"]["param"] == "purpose"


def test_batch_runs_at_background_priority(http: httpx2.Client, manager: Any) -> None:
    """All lines are answered, failures go to their own file, and nothing stands in the way of interactive requests."""
    wrong = json.loads(lines(1))
    wrong["custom_id"], wrong["body"]["model"] = "wrong", "none"
    file = upload(http, lines(20) + b"\n" + json.dumps(wrong).encode())
    batch = wait(http, start(http, file["id"])["id"], "completed")
    assert batch["request_counts"] == {"total": 21, "completed": 20, "failed": 1}
    results = content(http, batch["output_file_id"])
    assert [r["custom_id"] for r in results] == [f"c{i}" for i in range(20)]
    assert results[0]["response"]["body"]["choices"][0]["message"]["content"] == "Hello, world"
    errors = content(http, batch["error_file_id"])
    assert errors[0]["response"]["status_code"] == 404
    assert {r.priority for r in manager.requests} == {Priority.BACKGROUND}


def test_batch_waits_for_an_engine(http: httpx2.Client, manager: Any) -> None:
    """A line that meets no engine is tried again."""
    tries = 0
    say = manager.say("late")

    async def script(request: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise UnavailableError("no engine is ready")
        async for event in say(request):
            yield event

    manager.script = script
    batch = wait(http, start(http, upload(http, lines(1))["id"])["id"], "completed")
    assert batch["request_counts"]["completed"] == 1


def test_malformed_lines_fail_the_batch_with_their_numbers(http: httpx2.Client) -> None:
    """Broken JSON, double ids, foreign urls and streams are listed by line; nothing runs."""
    content_ = b"\n".join((b"{", lines(1), lines(1), lines(1, url="/v1/embeddings", custom_id="u")))
    batch = wait(http, start(http, upload(http, content_)["id"])["id"], "failed")
    assert [(e["line"], e["code"]) for e in batch["errors"]["data"]] == [
        (1, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_url"),
    ]


def test_batch_can_be_cancelled(http: httpx2.Client, manager: Any) -> None:
    """Cancel stops the lines that run."""
    manager.script = manager.events(wait=True)
    made = start(http, upload(http, lines(3))["id"])
    wait(http, made["id"], "in_progress")
    assert http.post(f"/v1/batches/{made['id']}/cancel").json()["status"] == "cancelled"
    end = time.monotonic() + 5
    while manager.open:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_batch_resumes_after_a_restart(manager: Any, tmp_path: Path) -> None:
    """Lines that were done stay done; the rest runs after the restart."""
    config = GatewayConfig(state_path=str(tmp_path / "state.db"))
    say, hang = manager.say("x"), manager.events(wait=True)

    def script(request: Any) -> Any:
        return say(request) if request.messages[0].content in ("Hi 0", "Hi 1") else hang(request)

    manager.script = script
    with running(create_app(manager, config)) as server, httpx2.Client(base_url=server.url, trust_env=False) as http:
        made = start(http, upload(http, lines(6))["id"])
        end = time.monotonic() + 10
        while http.get(f"/v1/batches/{made['id']}").json()["request_counts"]["completed"] < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    manager.requests.clear()
    manager.script = say
    with running(create_app(manager, config)) as server, httpx2.Client(base_url=server.url, trust_env=False) as http:
        batch = wait(http, made["id"], "completed")
        assert batch["request_counts"]["completed"] == 6
        assert len(content(http, batch["output_file_id"])) == 6
    assert len(manager.requests) == 4


def test_official_client_runs_a_batch(server: Any) -> None:
    """The openai package uploads, starts, waits for and reads a batch."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", lines(2)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        end = time.monotonic() + 10
        while batch.status != "completed":
            assert time.monotonic() < end
            batch = client.batches.retrieve(batch.id)
        assert batch.output_file_id
        assert len(client.files.content(batch.output_file_id).text.splitlines()) == 2


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_form_parser_never_fails_otherwise(body: bytes, content_type: bytes) -> None:
    """Any bytes are either a form or an HttpError."""
    for header in (content_type, b"multipart/form-data; boundary=x", b'multipart/form-data; boundary="' + content_type):
        with contextlib.suppress(HttpError):
            parse(header, body)


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_form_gives_back_what_was_put_in(contents: list[bytes]) -> None:
    """Every content that lacks the boundary comes back unchanged."""
    mark = "q7Zk0boundary"
    if any(mark.encode() in c for c in contents):
        pytest.skip("holds the boundary")
    body = b"".join(
        f'--{mark}\r\nContent-Disposition: form-data; name="f{i}"; filename="x"\r\n\r\n'.encode() + c + b"\r\n"
        for i, c in enumerate(contents)
    )
    body += f"--{mark}--\r\n".encode()
    if not contents:
        return
    parts = parse(f"multipart/form-data; boundary={mark}".encode(), body)
    assert [p.content for p in parts] == contents


def test_files_of_a_key_are_bounded(manager: Any) -> None:
    """Files beyond the bound of a key are a 429 that says how much is held; deleting makes room."""
    config = GatewayConfig(limits=Limits(stored_bytes=100))
    with running(create_app(manager, config)) as server, httpx2.Client(base_url=server.url, trust_env=False) as http:
        made = upload(http, b"x" * 80)
        refused = http.post("/v1/files", files={"file": ("a", b"x" * 30)}, data={"purpose": "batch"})
        assert (refused.status_code, "80" in refused.json()["error"]["message"]) == (429, True)
        http.delete(f"/v1/files/{made['id']}")
        upload(http, b"x" * 30)
