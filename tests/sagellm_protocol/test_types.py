import subprocess
import sys

import msgspec
import pytest

import sagellm_protocol as protocol
from sagellm_protocol import (
    ChatMessage,
    DeltaEvent,
    EndEvent,
    Error,
    ErrorCode,
    KVAllocateParams,
    Metrics,
    Request,
    Response,
    Sampling,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    Timestamps,
    from_json,
    to_json,
)
from sagellm_protocol.errors import InvalidArgumentError, SageError

GOOD = {"request_id": "r", "trace_id": "t", "model": "m", "max_tokens": 1, "prompt": "p"}
IDS = {"request_id": "r", "trace_id": "t", "engine_id": "e"}


def decode_request(**fields: object) -> Request:
    body = msgspec.json.encode({k: v for k, v in (GOOD | fields).items() if v is not ...})
    return from_json(b'{"v":"0.1","type":"Request","body":' + body + b"}", Request)


@pytest.mark.parametrize("missing", ["request_id", "trace_id", "model", "max_tokens"])
def test_required_fields(missing):
    """A request without a required field is refused with the field's name."""
    with pytest.raises(InvalidArgumentError, match=missing):
        decode_request(**{missing: ...})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_tokens", 0, "max_tokens is 0"),
        ("max_tokens", True, "max_tokens"),
        ("temperature", 2.1, r"temperature is 2.1: it must lie in \[0.0, 2.0\]"),
        ("top_p", 0, r"top_p is 0.0: it must lie in \(0.0, 1.0\]"),
        ("kv_budget_tokens", 0, "at least 1"),
        ("phase", "both", "phase"),
        ("request_id", "", "request_id is empty"),
        ("prompt", ..., "both missing"),
        ("messages", [{"role": "user", "content": "x"}], "both set"),
        ("rank", 0, "rank"),
    ],
)
def test_out_of_range(field, value, said):
    """A value out of its range is refused with the field, the value and the range."""
    with pytest.raises(InvalidArgumentError, match=said):
        decode_request(**{field: value})


def test_empty_messages():
    """A conversation without messages is refused."""
    with pytest.raises(InvalidArgumentError, match="messages is empty"):
        decode_request(prompt=..., messages=[])


def test_messages_as_plain_dicts():
    """The constructor takes messages as lists of dicts, and names a bad role."""
    request = Request(**{**GOOD, "prompt": None, "messages": [{"role": "user", "content": "hi"}]})
    assert request.messages == (ChatMessage(role="user", content="hi"),)
    with pytest.raises(InvalidArgumentError, match="messages"):
        Request(**{**GOOD, "prompt": None, "messages": [{"role": "robot"}]})


def test_shorthands_and_sampling_params():
    """Shorthands and max_tokens take their places; a contradiction is refused, not resolved in silence."""
    request = Request(**GOOD, temperature=0.5, sampling_params=SamplingParams(top_k=3, max_tokens=99))
    assert request.sampling() == SamplingParams(temperature=0.5, top_k=3, max_tokens=1)
    with pytest.raises(InvalidArgumentError, match=r"temperature is 0\.5 and sampling_params\.temperature is 0\.7"):
        Request(**GOOD, temperature=0.5, sampling_params=SamplingParams(temperature=0.7))


def test_to_generation():
    """The neutral request has the same ids, text and sampling."""
    neutral = Request(**GOOD, top_p=0.5, metadata={"a": 1, "b": "x"}).to_generation()
    assert (neutral.request_id, neutral.trace_id, neutral.model, neutral.prompt) == ("r", "t", "m", "p")
    assert neutral.sampling == SamplingParams(top_p=0.5, max_tokens=1)
    assert neutral.metadata == {"a": "1", "b": "x"}


@pytest.mark.parametrize("names", [("content", "content_tokens"), ("chunk", "chunk_tokens")])
def test_delta_has_both_generations_of_names(names):
    """A delta given by either generation of names offers both, as attributes and in JSON."""
    event = StreamEventDelta(**IDS, **{names[0]: "x", names[1]: [7]})
    assert (event.event, event.content, event.chunk) == ("delta", "x", "x")
    assert event.content_tokens == event.chunk_tokens == (7,)
    body = msgspec.json.decode(msgspec.json.encode(event))
    assert body == {**IDS, "event": "delta", "content": "x", "chunk": "x", "content_tokens": [7], "chunk_tokens": [7]}
    assert from_json(to_json(event), StreamEventDelta) == event


@pytest.mark.parametrize("name", ["content", "output_text"])
def test_end_has_both_generations_of_names(name):
    """An end event given by either generation of names offers both."""
    event = StreamEventEnd(**IDS, **{name: "whole"}, finish_reason="stop", output_tokens=[1, 2])
    assert (event.event, event.content, event.output_text, event.output_tokens) == ("end", "whole", "whole", (1, 2))


def test_names_that_differ():
    """Two names of one field with different values are refused."""
    with pytest.raises(InvalidArgumentError, match="content and chunk are two names"):
        StreamEventDelta(**IDS, content="a", chunk="b")


def test_delta_without_text():
    """A delta needs its text under one of the names."""
    with pytest.raises(InvalidArgumentError, match="content is missing"):
        StreamEventDelta(**IDS)


def test_aliases():
    """The short names are the same objects."""
    assert protocol.StartEvent is StreamEventStart
    assert DeltaEvent is StreamEventDelta
    assert EndEvent is StreamEventEnd
    assert Sampling is SamplingParams


def test_metrics_two_names_of_time_per_token():
    """tbt_ms and tpot_ms stand in for each other, and one of them is required."""
    base = {"ttft_ms": 1.0, "throughput_tps": 2.0, "peak_mem_mb": 3, "error_rate": 0.0}
    assert Metrics(**base, tbt_ms=5.0).tpot_ms == 5.0
    assert Metrics(**base, tpot_ms=5.0).tbt_ms == 5.0
    with pytest.raises(InvalidArgumentError, match="both missing"):
        Metrics(**base)


@pytest.mark.parametrize(
    "bad",
    [
        {"error_rate": 1.5},
        {"ttft_ms": -1},
        {"throughput_tps": float("nan")},
        {"itl_list": (1.0, -2.0)},
        {"prefix_hit_rate": 2},
    ],
)
def test_metrics_ranges(bad):
    """A metric that cannot have been measured is refused by name."""
    base = {"ttft_ms": 1.0, "throughput_tps": 2.0, "peak_mem_mb": 3, "error_rate": 0.0, "tbt_ms": 1.0}
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        Metrics(**{**base, **bad})


def test_timestamps_are_not_negative():
    """A time before 1970 is refused."""
    with pytest.raises(InvalidArgumentError, match="queued_at is -1"):
        Timestamps(queued_at=-1)


def test_error_and_finish_reason_agree():
    """An answer with an error does not claim to have stopped normally."""
    error = Error(code=ErrorCode.INTERNAL, message="m")
    with pytest.raises(InvalidArgumentError, match="although an error is set"):
        Response(request_id="r", trace_id="t", output_text="", output_tokens=(), finish_reason="stop", error=error)


def test_kv_allocation_needs_tokens():
    """An allocation of nothing is refused."""
    with pytest.raises(InvalidArgumentError, match="num_tokens is 0"):
        KVAllocateParams(request_id="r", num_tokens=0)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_code_has_its_class(code):
    """An error survives the way to the wire and back as the class that owns its code."""
    error = SageError.from_wire(Error(code=code, message="m", param="p"))
    assert error.code is code
    assert error.to_wire().code is code
    assert (error.message, error.param) == ("m", "p")


def test_presets():
    """The four presets exist, and another name is refused with the list."""
    assert Sampling.preset("deterministic").greedy
    with pytest.raises(InvalidArgumentError, match="deterministic, precise, balanced, creative"):
        Sampling.preset("wild")


def test_public_names():
    """Every name of __all__ exists, and importing the package brings neither numpy nor asyncio nor HTTP."""
    assert all(hasattr(protocol, name) for name in protocol.__all__)
    assert protocol.__all__ == sorted(protocol.__all__, key=protocol.__all__.index)
    code = "import sys, sagellm_protocol; print(sorted({'numpy', 'asyncio', 'httpx2', 'http', 'pickle'} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == "[]"
