from __future__ import annotations

import re
from typing import Any

import httpx2
import jsonschema
import pytest

from sagellm_gateway.openapi import document
from sagellm_gateway.routes.table import ROUTES


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    return document(ROUTES, "0", secured=True)


def test_document_lists_every_route(http: httpx2.Client) -> None:
    """The served document is OpenAPI 3.1 and has each method of each path."""
    served = http.get("/openapi.json").json()
    assert served["openapi"] == "3.1.0"
    for spec in ROUTES:
        path = spec.path.replace(":path", "")
        assert spec.method.lower() in served["paths"][path], spec.path


def test_document_is_sound(api: dict[str, Any]) -> None:
    """Every reference resolves, every schema is a valid JSON schema, operation ids are unique, 4xx are documented."""
    references = set(re.findall(r"#/components/schemas/([\w.\[\], ]+)", str(api)))
    assert references <= api["components"]["schemas"].keys()
    for schema in api["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [o for methods in api["paths"].values() for o in methods.values()]
    ids = [o["operationId"] for o in operations]
    assert len(ids) == len(set(ids))
    assert all({"401", "403", "404", "429", "503"} <= o["responses"].keys() for o in operations)
    assert all(o["summary"] for o in operations)


def test_pages_fetch_nothing_from_elsewhere(http: httpx2.Client) -> None:
    """The docs and the chat page work offline: own scripts only, by policy, and text never becomes markup."""
    for path in ("/", "/docs"):
        page = http.get(path)
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "://" not in page.text
    for path in ("/chat.js", "/docs.js"):
        script = http.get(path).text
        assert "innerHTML" not in script
        assert "://" not in script
