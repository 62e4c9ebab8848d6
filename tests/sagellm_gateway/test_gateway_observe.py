from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.inprocess import application
from sagellm_gateway.metric_families import RULES, Family, merge
from sagellm_gateway.middleware.edge import Edge
from sagellm_gateway.middleware.tracing import Tracing

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a secret prompt"}]}
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_spans_join_the_clients_trace(manager: Any) -> None:
    """A span has the client's trace id, the route's template, the model and its tokens, and no prompt text."""
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter = export.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    inner = application(manager)
    app = Edge(Tracing(inner.app, provider), inner.gateway)
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.post("/v1/chat/completions", json=CHAT, headers={"traceparent": PARENT})
    assert answer.status_code == 200
    (span,) = exporter.get_finished_spans()
    assert format(span.context.trace_id, "032x") == PARENT.split("-")[1]
    assert span.name == "POST /v1/chat/completions"
    assert span.attributes["gen_ai.request.model"] == "tiny"
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert "secret" not in str(span.attributes)
    assert manager.requests[-1].trace_id == PARENT.split("-")[1]


def test_access_line_has_the_id_and_no_prompt(http: httpx2.Client, caplog: Any) -> None:
    """Each request is one record with id, route, status, model and time; what was said is not in it."""
    with caplog.at_level(logging.INFO, logger="sagellm_gateway.access"):
        http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine"})
        http.get("/v1/models/a-name-that-nobody-serves")
    record = next(r for r in caplog.records if getattr(r, "request_id", "") == "mine")
    assert (record.route, record.status, record.model) == ("/v1/chat/completions", 200, "tiny")
    assert record.duration_ms > 0
    assert "secret" not in caplog.text
    assert "nobody" not in caplog.text


def test_nothing_configures_logging() -> None:
    """Importing and making an app adds no handler anywhere."""
    assert not logging.getLogger("sagellm_gateway").handlers
    assert not logging.getLogger("sagellm_gateway.access").handlers


def test_every_gauge_has_a_sum(stack_http: httpx2.Client) -> None:
    """Each gauge that a server shows has a rule for several processes, and the sum over one process is the process."""
    text = stack_http.get("/metrics").text
    gauges = set(re.findall(r"^# TYPE (\w+) gauge$", text, re.MULTILINE))
    created = {name for name in gauges if name.endswith("_created")}
    assert gauges - created == RULES.keys()
    one = [
        Family("a", "text", "counter", [("a_total", {"x": "1"}, 2.0)]),
        Family("sagellm_ready", "", "gauge", [("sagellm_ready", {}, 1.0)]),
    ]
    assert merge([one]) == one


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 100), min_size=1), min_size=1, max_size=4))
def test_counters_of_processes_add_up(processes: list[dict[str, int]]) -> None:
    """The sum over processes has each label that any has, with all that was counted for it."""
    families = [
        [Family("a", "", "counter", [("a_total", {"x": label}, float(count)) for label, count in counts.items()])]
        for counts in processes
    ]
    (merged,) = merge(families)
    wanted = sum((Counter(counts) for counts in processes), Counter())
    assert {labels["x"]: value for _, labels, value in merged.samples if value} == dict(wanted)
