"""Inputs that must not hurt: each gives a clean 4xx, no leak, and the same process serves the next request."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
from typing import Any

import httpx2
import pytest

from sagellm_gateway.testing import Running

pytestmark = pytest.mark.usefixtures("server_is_fine")

USER = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": "mock", "messages": USER, "max_tokens": 2}
LEAKS = ("Traceback", "site-packages", "/src/", ".py", "0x7f", "sagellm_", os.sep + "home", "Exception")


def chat(**change: Any) -> dict[str, Any]:
    return {**CHAT, **change}


def schema(value: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


def tool(**change: Any) -> dict[str, Any]:
    return chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, **change}}])


def part(kind: str, **fields: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": [{"type": kind, **fields}]}])


def deep(n: int) -> Any:
    value: Any = {}
    for _ in range(n):
        value = {"a": value}
    return value


def check_clean(answer: httpx2.Response, *statuses: int) -> None:
    """A 4xx in some documented shape, without a word about our insides."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    if statuses:
        assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    body = answer.json()
    assert "error" in body or "detail" in body
    for leak in LEAKS:
        assert leak not in answer.text, answer.text[:500]
    assert len(answer.content) < 4096


NUMBERS: list[tuple[str, Any]] = [
    (field, value)
    for field, values in {
        "n": (0, -1, 10**9, 2**70, 1.5, "1", True, [1]),
        "temperature": (-1, 2.1, 1e308, "hot", [], True),
        "top_p": (0, -0.5, 1.5, 1e308, "x"),
        "top_k": (-1, 2**40, 0.5, "x"),
        "min_p": (-0.1, 1.1, "x"),
        "typical_p": (0, 2),
        "repetition_penalty": (0, -1, 1e308),
        "presence_penalty": (-2.1, 2.1, 1e308),
        "frequency_penalty": (-2.1, 2.1, "x"),
        "max_tokens": (0, -1, 2**40, 1e308, "many", 1.5),
        "max_completion_tokens": (0, -1, 2**63),
        "min_tokens": (-1, 2**40),
        "seed": (2**64, -(2**64), 1.5, "x"),
        "priority": (-1, 5, 2**40),
        "top_logprobs": (-1, 21, 2**40, "x"),
    }.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), NUMBERS, ids=lambda v: str(v)[:24])
def test_numbers_out_of_range(attacker: httpx2.Client, field: str, value: Any) -> None:
    """A number out of range or of the wrong type is a 400 that names the field."""
    body = chat(logprobs=True) if field == "top_logprobs" else chat()
    if field == "max_completion_tokens":
        del body["max_tokens"]
    answer = attacker.post("/v1/chat/completions", json={**body, field: value})
    check_clean(answer, 400)
    assert answer.json()["error"]["param"] == field


RAW_JSON = {
    "empty": b"",
    "not json": b"hello",
    "truncated": b'{"model": "mo',
    "array": b"[]",
    "string": b'"x"',
    "number": b"1",
    "null": b"null",
    "NaN": b'{"model": "mock", "messages": [], "temperature": NaN}',
    "Infinity": b'{"model": "mock", "messages": [], "temperature": Infinity}',
    "1e400": b'{"model": "mock", "messages": [], "temperature": 1e400}',
    "huge integer": b'{"model": "mock", "messages": [], "seed": ' + b"9" * 5000 + b"}",
    "duplicate keys": b'{"model": "mock", "model": "other", "messages": []}',
    "nested duplicate keys": b'{"model": "mock", "messages": [{"role": "user", "content": "a", "content": "b"}]}',
    "escaped duplicate keys": b'{"model": "mock", "mod\\u0065l": "other", "messages": []}',
    "lone surrogate": b'{"model": "mock", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "lone low surrogate": b'{"model": "mock", "messages": [{"role": "user", "content": "\\udc00x"}]}',
    "escaped NUL": b'{"model": "mock", "messages": [{"role": "user", "content": "a\\u0000b"}]}',
    "raw NUL": b'{"model": "mock", "messages": [{"role": "user", "content": "a\x00b"}]}',
    "invalid UTF-8": b'{"model": "mock", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "overlong UTF-8": b'{"model": "\xc0\xae\xc0\xae", "messages": []}',
    "UTF-16": '{"model": "mock"}'.encode("utf-16"),
    "BOM": b'\xef\xbb\xbf{"model": "mock", "messages": []}',
    "comments": b'{"model": "mock" /* x */, "messages": []}',
    "single quotes": b"{'model': 'mock'}",
    "trailing comma": b'{"model": "mock",}',
    "two values": b'{"model": "mock"} {"model": "mock"}',
    "100,000 brackets": b"[" * 100_000,
    "100,000 nested arrays": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "65 levels": json.dumps(deep(65)).encode(),
    "100,000 closed brackets": b'{"a":[' + b"[]," * 100_000 + b"[]]}",
    "1 MB of quotes": b'"' * 1_000_001,
    "1 MB of backslashes": b'{"a": "' + b"\\" * 1_000_001,
    "1 MB of escaped quotes": b'"' + b'\\"' * 500_000,
    "pickle": pickle.dumps({"model": "mock"}),
    "torch file": b"PK\x03\x04" + b"\x00" * 100 + b"archive/data.pkl",
    "GGUF file": b"GGUF" + b"\xff" * 200,
    "safetensors file": b"\xff" * 8 + b"{}",
}


@pytest.mark.parametrize("name", RAW_JSON)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
def test_bodies_that_are_no_object(attacker: httpx2.Client, name: str, path: str) -> None:
    """Bytes that are no JSON object of ours are a 400 in the dialect's shape, in linear time."""
    headers = {"content-type": "application/json"}
    check_clean(attacker.post(path, content=RAW_JSON[name], headers=headers), 400)


REQUESTS: dict[str, dict[str, Any]] = {
    "chat_template": chat(chat_template="{{ ''.__class__.__mro__ }}"),
    "chat_template_kwargs": chat(chat_template_kwargs={"x": "{{ 7*7 }}"}),
    "logits_processors": chat(logits_processors=["os.system"]),
    "api_base": chat(api_base="http://169.254.169.254/"),
    "base_url": chat(base_url="http://127.0.0.1:22/"),
    "api_key in body": chat(api_key="x"),
    "best_of": chat(best_of=5),
    "beam search": chat(use_beam_search=True),
    "truncate": chat(truncate_prompt_tokens=5),
    "functions": chat(functions=[{"name": "f"}]),
    "structured_outputs": chat(structured_outputs={"regex": "a"}),
    "kv_transfer_params": chat(kv_transfer_params={"do_remote_decode": True}),
    "no messages": {"model": "mock"},
    "empty messages": chat(messages=[]),
    "messages as text": chat(messages="Hi"),
    "null message": chat(messages=[None]),
    "message without role": chat(messages=[{"content": "Hi"}]),
    "unknown role": chat(messages=[{"role": "root", "content": "Hi"}]),
    "content of numbers": chat(messages=[{"role": "user", "content": 5}]),
    "no content": chat(messages=[{"role": "user"}]),
    "tool without id": chat(messages=[*USER, {"role": "tool", "content": "x"}]),
    "image on loopback": part("image_url", image_url={"url": "http://127.0.0.1:8889/"}),
    "image on link-local": part("image_url", image_url={"url": "http://169.254.169.254/latest"}),
    "image in a file": part("image_url", image_url={"url": "file:///etc/passwd"}),
    "image by redirect": part("image_url", image_url={"url": "http://example.com/redirect"}),
    "image as data": part("image_url", image_url={"url": "data:image/png;base64,AAAA"}),
    "audio": part("input_audio", input_audio={"data": "AAAA", "format": "wav"}),
    "file part": part("file", file={"file_id": "../../etc/passwd"}),
    "video": part("video_url", video_url={"url": "http://x"}),
    "unknown part": part("exploit"),
    "text part without text": part("text"),
    "overlong prompt": chat(messages=[{"role": "user", "content": "x" * 100_000}]),
    "stop with an empty string": chat(stop=["a", ""]),
    "1,000 stop strings": chat(stop=[str(i) for i in range(1000)]),
    "stop as number": chat(stop=5),
    "logit_bias for words": chat(logit_bias={"hello": 1}),
    "logit_bias over 100": chat(logit_bias={"1": 1000}),
    "logit_bias beyond the vocabulary": chat(logit_bias={"999999999": 1}),
    "logit_bias with 5,000 entries": chat(logit_bias={str(i): 1 for i in range(5000)}),
    "stop_token_ids beyond the vocabulary": chat(stop_token_ids=[2**40]),
    "allowed_token_ids empty": chat(allowed_token_ids=[]),
    "regex bomb over 1 MB": schema({"type": "string", "pattern": "(a+)+b" * 200_000}),
    "remote $ref": schema({"$ref": "http://169.254.169.254/schema.json"}),
    "file $ref": schema({"$ref": "file:///etc/passwd"}),
    "nested remote $ref": schema({"properties": {"a": {"items": [{"$ref": "//evil/x"}]}}}),
    "schema of 1 MB": schema({"enum": ["x" * 100] * 10_000}),
    "schema too deep": schema(deep(70)),
    "unknown response_format": chat(response_format={"type": "xml"}),
    "response_format without schema": chat(response_format={"type": "json_schema"}),
    "response_format as text": chat(response_format="json"),
    "guided twice": chat(guided_regex="a", guided_choice=["b"]),
    "guided_regex of 1 MB": chat(guided_regex="(a+)+b" * 200_000),
    "guided_choice empty": chat(guided_choice=[]),
    "tool name with a path": tool(name="../../x"),
    "tool name empty": tool(name=""),
    "tool name of 1,000": tool(name="a" * 1000),
    "tool name in Unicode": tool(name="наме"),
    "tool parameters too deep": tool(parameters=deep(70)),
    "tool parameters with remote $ref": tool(parameters={"$ref": "https://evil/x"}),
    "129 tools": chat(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]),
    "the same tool twice": chat(tools=[{"type": "function", "function": {"name": "f"}}] * 2),
    "tool of another type": chat(tools=[{"type": "web_search"}]),
    "tool_choice of no tool": chat(tool_choice={"type": "function", "function": {"name": "rm"}}),
    "tool_choice required without tools": chat(tool_choice="required"),
    "stream_options without stream": chat(stream_options={"include_usage": True}),
    "stream as text": chat(stream="yes"),
    "audio modality": chat(modalities=["text", "audio"]),
    "metadata of numbers": chat(metadata={"a": 1}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_are_refused(attacker: httpx2.Client, name: str) -> None:
    """A request that asks for what is wrong, dangerous or not offered is a 400 that names the field."""
    answer = attacker.post("/v1/chat/completions", json=REQUESTS[name])
    check_clean(answer, 400)
    error = answer.json()["error"]
    assert error["param"] or error["code"] == "invalid_json"


NAMES = (
    "../../etc/passwd", "..", "%00", "%2e%2e", "/etc/passwd", "\\\\host\\share", "a" * 300, "", "file:///etc/passwd",
    "http://127.0.0.1/x", "model\nname", "\x1b[31mred", "'; DROP TABLE keys; --", "{{7*7}}", "${jndi:ldap://x}", "~root",
    "mock/../mock", "con", "mock ", " mock", "MOCK",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_model_names(attacker: httpx2.Client, name: str) -> None:
    """A model's name opens nothing: it is served or it is not."""
    check_clean(attacker.post("/v1/chat/completions", json=chat(model=name)), 400, 404)
    check_clean(attacker.post("/v1/messages", json=chat(model=name)), 400, 404)
    check_clean(attacker.post("/api/show", json={"model": name}), 400, 404)
    check_clean(attacker.post("/api/pull", json={"model": name}), 400, 404)


OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "100,000 prompts": ("/v1/completions", {"model": "mock", "prompt": ["a"] * 100_000}),
    "prompts times n": ("/v1/completions", {"model": "mock", "prompt": ["a"] * 100, "n": 100}),
    "token beyond the vocabulary": ("/v1/completions", {"model": "mock", "prompt": [10**6]}),
    "token beyond 64 bits": ("/v1/completions", {"model": "mock", "prompt": [2**80]}),
    "negative token": ("/v1/completions", {"model": "mock", "prompt": [-1]}),
    "tokens and text mixed": ("/v1/completions", {"model": "mock", "prompt": [1, "a"]}),
    "prompt of nothing": ("/v1/completions", {"model": "mock", "prompt": []}),
    "empty prompt": ("/v1/completions", {"model": "mock", "prompt": ""}),
    "suffix and echo": ("/v1/completions", {"model": "mock", "prompt": "a", "suffix": "b", "echo": True}),
    "suffix in a chat": ("/v1/chat/completions", {**CHAT, "suffix": "b"}),
    "suffix that is no text": ("/v1/completions", {"model": "mock", "prompt": "a", "suffix": ["b"]}),
    "logprobs 21": ("/v1/completions", {"model": "mock", "prompt": "a", "logprobs": 21}),
    "anthropic without max_tokens": ("/v1/messages", {"model": "mock", "messages": USER}),
    "anthropic image by url": (
        "/v1/messages",
        {
            **CHAT,
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}
            ],
        },
    ),
    "anthropic computer tool": ("/v1/messages", {**CHAT, "tools": [{"type": "bash_20250124", "name": "bash"}]}),
    "ollama images": (
        "/api/chat",
        {"model": "mock", "messages": [{"role": "user", "content": "", "images": ["AAAA"]}]},
    ),
    "ollama template": ("/api/generate", {"model": "mock", "prompt": "a", "template": "{{ .Prompt }}"}),
    "ollama options of another type": ("/api/chat", {"model": "mock", "messages": USER, "options": {"top_k": "x"}}),
    "ollama options as list": ("/api/chat", {"model": "mock", "messages": USER, "options": [1]}),
    "ollama insecure pull": ("/api/pull", {"model": "mock", "insecure": True}),
    "ollama copy over a path": ("/api/copy", {"source": "mock", "destination": "../../x"}),
    "responses web search": ("/v1/responses", {"model": "mock", "input": "a", "tools": [{"type": "web_search"}]}),
    "responses image": (
        "/v1/responses",
        {
            "model": "mock",
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1"}]}],
        },
    ),
    "responses foreign previous": (
        "/v1/responses",
        {"model": "mock", "input": "a", "previous_response_id": "' OR 1=1 --"},
    ),
    "detokenize beyond the vocabulary": ("/detokenize", {"model": "mock", "tokens": [2**62]}),
    "detokenize negative": ("/detokenize", {"model": "mock", "tokens": [-5]}),
    "adapter at a system path": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}),
    "adapter at no path": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": ""}),
    "adapter without a name": ("/v1/load_lora_adapter", {"lora_name": "", "lora_path": "/tmp"}),
    "batch of a foreign file": (
        "/v1/batches",
        {"input_file_id": "../x", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    ),
    "batch of a foreign endpoint": (
        "/v1/batches",
        {"input_file_id": "x", "endpoint": "http://169.254.169.254/", "completion_window": "24h"},
    ),
    "register on a bad port": (
        "/v1/management/engines/register",
        {"engine_id": "e", "model_id": "m", "host": "127.0.0.1", "port": 2**20},
    ),
    "key of an unknown role": ("/v1/management/keys", {"name": "x", "role": "root"}),
    "key with a control character": ("/v1/management/keys", {"name": "a\x1bb"}),
    "session title with a line break": ("/sessions", {"title": "a\nb"}),
    "2,049 embeddings": ("/v1/embeddings", {"model": "mock", "input": ["a"] * 2049}),
    "embedding of nothing": ("/v1/embeddings", {"model": "mock", "input": []}),
    "embedding of numbers": ("/v1/embeddings", {"model": "mock", "input": [1.5]}),
    "embedding in 10**9 dimensions": ("/v1/embeddings", {"model": "mock", "input": "a", "dimensions": 10**9}),
    "rerank of nothing": ("/v1/rerank", {"model": "mock", "query": "a", "documents": []}),
    "rerank top_n 0": ("/v1/rerank", {"model": "mock", "query": "a", "documents": ["b"], "top_n": 0}),
    "score of unequal lists": ("/v1/score", {"model": "mock", "text_1": ["a", "b"], "text_2": ["a", "b", "c"]}),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_routes_refuse_cleanly(attacker: httpx2.Client, name: str) -> None:
    """Every route refuses what is wrong in its own shape."""
    path, body = OTHER[name]
    check_clean(attacker.post(path, json=body), 400, 404)


def exchange(target: Running, sent: bytes, timeout: float = 10.0) -> bytes:
    with socket.create_connection(("127.0.0.1", target.port), timeout=timeout) as sock:
        sock.sendall(sent)
        seen = b""
        while b"\r\n\r\n" not in seen or (b'"}' not in seen and b"}}" not in seen):
            got = sock.recv(65536)
            if not got:
                break
            seen += got
    return seen


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    found = [line, *headers]
    if not any(h.lower().startswith(b"host:") for h in headers):
        found.append(b"Host: localhost")
    if body:
        found.append(b"Content-Length: " + str(len(body)).encode())
    return b"\r\n".join(found) + b"\r\nConnection: close\r\n\r\n" + body


GOOD = json.dumps(CHAT).encode()
POST = b"POST /v1/chat/completions HTTP/1.1"
JSON = b"Content-Type: application/json"

WIRE: dict[str, tuple[bytes, set[int]]] = {
    "foreign Host": (request(b"GET /v1/models HTTP/1.1", b"Host: evil.example"), {403}),
    "rebinding Host with port": (request(b"GET /v1/models HTTP/1.1", b"Host: evil.example:8889"), {403}),
    "Host with a path": (request(b"GET /v1/models HTTP/1.1", b"Host: localhost/x"), {400, 403}),
    "Host with user info": (request(b"GET /v1/models HTTP/1.1", b"Host: localhost@evil.example"), {403}),
    "Host like localhost": (request(b"GET /v1/models HTTP/1.1", b"Host: localhost.evil.example"), {403}),
    "Host in Unicode": (request(b"GET /v1/models HTTP/1.1", "Host: löcalhost".encode()), {400, 403}),
    "empty Host": (request(b"GET /v1/models HTTP/1.1", b"Host:"), {400, 403}),
    "two Hosts": (request(b"GET /v1/models HTTP/1.1", b"Host: localhost", b"Host: evil.example"), {400}),
    "Host with a bad port": (request(b"GET /v1/models HTTP/1.1", b"Host: localhost:99999999"), {400, 403}),
    "decimal Host": (request(b"GET /v1/models HTTP/1.1", b"Host: 2130706433"), {403}),
    "absolute URI of another": (request(b"GET http://evil.example/v1/models HTTP/1.1", b"Host: evil.example"), {403}),
    "foreign Origin": (request(POST, JSON, b"Origin: https://evil.example", body=GOOD), {403}),
    "null Origin": (request(POST, JSON, b"Origin: null", body=GOOD), {403}),
    "foreign Origin, text/plain": (
        request(POST, b"Content-Type: text/plain", b"Origin: https://evil.example", body=GOOD),
        {403, 415},
    ),
    "text/plain": (request(POST, b"Content-Type: text/plain", body=GOOD), {415}),
    "multipart to chat": (request(POST, b"Content-Type: multipart/form-data; boundary=x", body=GOOD), {415}),
    "cross-site by fetch metadata": (request(POST, JSON, b"Sec-Fetch-Site: cross-site", body=GOOD), {403}),
    "preflight of a stranger": (
        request(
            b"OPTIONS /v1/chat/completions HTTP/1.1",
            b"Origin: https://evil.example",
            b"Access-Control-Request-Method: POST",
        ),
        {403},
    ),
    "gzip bomb": (request(POST, JSON, b"Content-Encoding: gzip", body=gzip.compress(b"\x00" * 10_000_000)), {415}),
    "deflate": (request(POST, JSON, b"Content-Encoding: deflate", body=b"x\x9c"), {415}),
    "br": (request(POST, JSON, b"Content-Encoding: br", body=b"x"), {415}),
    "zstd": (request(POST, JSON, b"Content-Encoding: zstd", body=b"x"), {415}),
    "double slash": (request(b"GET //v1/models HTTP/1.1"), {400, 404}),
    "dots": (request(b"GET /v1/../v1/management/keys HTTP/1.1"), {404}),
    "encoded dots": (request(b"GET /v1/%2e%2e/management/keys HTTP/1.1"), {404}),
    "double encoded dots": (request(b"GET /v1/%252e%252e/keys HTTP/1.1"), {404}),
    "encoded slash": (request(b"GET /v1%2fmanagement%2fnothing HTTP/1.1"), {404}),
    "NUL in the path": (request(b"GET /v1/models/%00 HTTP/1.1"), {400, 404}),
    "invalid UTF-8 in the path": (request(b"GET /v1/models/%ff%fe HTTP/1.1"), {400, 404}),
    "line break in the path": (request(b"GET /v1/models/a%0d%0aSet-Cookie:%20x HTTP/1.1"), {404}),
    "static files": (request(b"GET /web/../server.py HTTP/1.1"), {404}),
    "path of 20 kB": (request(b"GET /" + b"a" * 20_000 + b" HTTP/1.1"), {400, 404, 431}),
    "query of 40 kB": (request(b"GET /v1/models?" + b"a=b&" * 10_000 + b" HTTP/1.1"), {400, 414, 431}),
    "unknown method": (request(b"BREW /v1/models HTTP/1.1"), {400, 405}),
    "TRACE": (request(b"TRACE /v1/models HTTP/1.1"), {400, 405}),
    "CONNECT": (request(b"CONNECT evil.example:443 HTTP/1.1", b"Host: evil.example"), {400, 403, 404, 405}),
    "GET on a POST route": (request(b"GET /v1/chat/completions HTTP/1.1"), {405}),
    "8 MB of headers": (request(b"GET /v1/models HTTP/1.1", b"X-A: " + b"a" * 8_000_000), {400, 431}),
    "1 MB key": (request(b"GET /v1/models HTTP/1.1", b"Authorization: Bearer " + b"a" * 1_000_000), {400, 431}),
    "200 headers": (request(b"GET /v1/models HTTP/1.1", *(b"X-%d: a" % i for i in range(200))), {431}),
    "ANSI in X-Request-Id": (request(b"GET /v1/models HTTP/1.1", b"X-Request-Id: \x1b[31mred"), {400}),
    "tab in X-Request-Id": (request(b"GET /v1/models HTTP/1.1", b"X-Request-Id: a\tb"), {400}),
    "1 kB X-Request-Id": (request(b"GET /v1/models HTTP/1.1", b"X-Request-Id: " + b"a" * 1000), {400}),
    "bare CR in a header": (request(b"GET /v1/models HTTP/1.1", b"X-A: a\rX-B: b"), {400}),
    "obs-fold": (request(b"GET /v1/models HTTP/1.1", b"X-A: a\r\n b"), {400}),
    "header without a colon": (request(b"GET /v1/models HTTP/1.1", b"nonsense"), {400}),
    "space before the colon": (request(b"GET /v1/models HTTP/1.1", b"Host : localhost"), {400}),
    "smuggling: both lengths": (
        request(POST, JSON, b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\nX"),
        {400},
    ),
    "smuggling: two lengths": (request(POST, JSON, b"Content-Length: 5", body=b"12345"), {400}),
    "negative length": (request(POST, JSON, b"Content-Length: -5"), {400}),
    "length of letters": (request(POST, JSON, b"Content-Length: abc"), {400}),
    "length of 100 digits": (request(POST, JSON, b"Content-Length: " + b"9" * 100), {400, 413}),
    "length of 1 TB": (request(POST, JSON, b"Content-Length: 1099511627776"), {413}),
    "bad chunk size": (request(POST, JSON, b"Transfer-Encoding: chunked") + b"xyz\r\n", {400}),
    "unknown transfer coding": (request(POST, JSON, b"Transfer-Encoding: gzip", body=b"x"), {400}),
    "bad timeout header": (request(POST, JSON, b"X-Request-Timeout: soon", body=GOOD), {400}),
    "negative timeout header": (request(POST, JSON, b"X-Request-Timeout: -1", body=GOOD), {400}),
    "NaN timeout header": (request(POST, JSON, b"X-Request-Timeout: nan", body=GOOD), {400}),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n", {400}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    "HTTP/9.9": (request(b"GET /v1/models HTTP/9.9"), {400}),
}


# hyper, under granian, closes such connections without a word, or speaks HTTP/2 by itself.
UVICORN_ONLY = ("8 MB of headers", "HTTP/2 preface")


@pytest.mark.parametrize("name", WIRE)
def test_bytes_on_the_wire(target: Running, name: str) -> None:
    """Tricks with hosts, origins, paths, headers and lengths end in a 4xx, never in another handler."""
    if target.kind == "granian" and name in UVICORN_ONLY:
        pytest.skip("the server's own layer answers")
    sent, statuses = WIRE[name]
    seen = exchange(target, sent)
    status = int(seen.split(b" ", 2)[1])
    assert status in statuses, seen[:300]
    for leak in LEAKS:
        assert leak.encode() not in seen
    assert b"\x1b" not in seen


def test_upgrade_is_refused_or_ignored(target: Running) -> None:
    """A WebSocket upgrade gets plain HTTP: there is none here."""
    seen = exchange(target, request(b"GET /v1/nothing HTTP/1.1", b"Upgrade: websocket", b"Sec-WebSocket-Key: eA=="))
    assert b"101 " not in seen


def test_special_tokens_in_user_text_stay_text(attacker: httpx2.Client) -> None:
    """What looks like a control token in a user's text is encoded as its characters."""
    plain = attacker.post(
        "/tokenize", json={"model": "mock", "prompt": "<|im_end|>", "add_special_tokens": False}
    ).json()
    assert plain["count"] >= len("<|im_end|>") // 2
    assert max(plain["tokens"]) < 256


def test_many_schemas_do_not_pile_up(attacker: httpx2.Client) -> None:
    """Hundreds of distinct schemas and unknown models neither fail the server nor grow its metrics."""
    before = len(attacker.get("/metrics").text)
    for i in range(300):
        answer = attacker.post("/v1/chat/completions", json=schema({"type": "object", "properties": {f"p{i}": {}}}))
        assert answer.status_code < 500
        attacker.post("/v1/chat/completions", json=chat(model=f"random-{i}"))
    assert len(attacker.get("/metrics").text) < before + 20_000
