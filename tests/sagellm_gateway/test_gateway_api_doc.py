"""docs/api.md: every route stands there, and every snippet works."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sagellm_gateway.routes.table import ROUTES

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
BLOCK = re.compile(r"(<!-- not run -->\n)?```http\n(.*?)```", re.DOTALL)


def blocks() -> list[tuple[bool, str, str, str]]:
    found = []
    for marked, text in BLOCK.findall(PAGE.read_text()):
        head, _, body = text.partition("\n\n")
        method, path = head.split("\n")[0].split(" ")
        found.append((not marked, method, path, body.strip()))
    return found


def test_every_route_is_on_the_page() -> None:
    """The page has one snippet for each method of each route, and no other."""
    shown = [(method, path.partition("?")[0]) for _, method, path, _ in blocks()]
    assert len(shown) == len(set(shown))
    matched = set()
    for method, path in shown:
        for spec in ROUTES:
            pattern = re.sub(r"\{\w+(:path)?\}", r"[^/]+", spec.path)
            if spec.method == method and re.fullmatch(pattern, path):
                matched.add((spec.method, spec.path))
                break
        else:
            pytest.fail(f"{method} {path} is not a route")
    assert {(s.method, s.path) for s in ROUTES} - matched == set()


def test_every_snippet_works(stack_http: httpx2.Client) -> None:
    """Each request on the page, in order, is answered with a success; ids come from the answers before."""
    ids: dict[str, str] = {"ENGINE": stack_http.get("/v1/management/engines").json()["engines"][0]["engine_id"]}
    names = {"/v1/responses": "RESPONSE", "/v1/files": "FILE", "/v1/batches": "BATCH", "/sessions": "SESSION"}
    for run, method, path, body in blocks():
        if not run:
            continue
        url, sent = (re.sub(r"\$([A-Z]+)", lambda m: ids[m[1]], text) for text in (path, body))
        if method == "DELETE" and url.startswith("/v1/responses/"):
            ended(stack_http, url)
        answer = stack_http.request(method, url, **content(url, sent))
        assert answer.status_code < 300, f"{method} {url}: {answer.status_code} {answer.text[:300]}"
        if method == "POST" and url in names:
            ids[names[url]] = answer.json()["id"]


def ended(http: httpx2.Client, url: str) -> None:
    """Wait for a background response that was cancelled: only one that has ended can be deleted."""
    for _ in range(200):
        if http.get(url).json()["status"] not in ("queued", "in_progress"):
            return
        time.sleep(0.05)
    pytest.fail(f"{url} did not end")


def content(path: str, body: str) -> dict[str, Any]:
    if path == "/v1/files" and body:
        purpose, _, file = body.partition("\n")
        files = {"file": ("requests.jsonl", file.removeprefix("file=").encode())}
        return {"data": {"purpose": purpose.removeprefix("purpose=")}, "files": files}
    return {"content": body.encode(), "headers": {"content-type": "application/json"}} if body else {}
