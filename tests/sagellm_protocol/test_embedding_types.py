from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_protocol.codec import from_json, from_msgpack, to_json, to_msgpack
from sagellm_protocol.embedding import EmbeddingRequest, EmbedRequest, EmbedResult, ScoreRequest, relevance
from sagellm_protocol.errors import InvalidArgumentError


def result(width: int, *values: float) -> EmbedResult:
    return EmbedResult(request_id="r", width=width, data=struct.pack(f"<{len(values)}f", *values), prompt_tokens=1)


@pytest.mark.parametrize(
    "value",
    [
        EmbeddingRequest(request_id="a", model="m", inputs=("text", (1, 2)), dimensions=8, normalize=False),
        ScoreRequest(request_id="a", model="m", query="q", documents=("d", "e")),
        EmbedRequest(request_id="a", inputs=((1, 2), (3,)), token_types=((0, 1), (0,)), task="classify"),
        result(2, 1.0, 2.0),
    ],
)
def test_types_survive_both_codecs(value: object) -> None:
    """JSON and msgpack give back what was put in, bytes included."""
    assert from_json(to_json(value), type=type(value)) == value
    assert from_msgpack(to_msgpack(value), type=type(value)) == value


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=12).filter(lambda v: len(v) % 3 == 0))
def test_vectors_are_the_floats(values: list[float]) -> None:
    """Vectors hold the very float32 numbers, cut by width."""
    assert result(3, *values).vectors() == [values[at : at + 3] for at in range(0, len(values), 3)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"inputs": ()}, "input"),
        ({"inputs": ((1,), ())}, "input"),
        ({"inputs": ((1, 2),), "token_types": ((0,),)}, "token_types"),
        ({"inputs": ((1,),), "dimensions": 0}, "dimensions"),
        ({"inputs": ((1,),), "task": "logprobs"}, "target_ids"),
        ({"inputs": ((1,),), "target_ids": (4,)}, "target_ids"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], param: str) -> None:
    """An empty input and fields that contradict each other are refused by name."""
    with pytest.raises(InvalidArgumentError) as caught:
        EmbedRequest(request_id="r", **fields)
    assert caught.value.param == param


def test_relevance_of_logits_and_of_yes_and_no() -> None:
    """A cross-encoder's logit becomes its sigmoid, yes against no their share, at any size; other widths are refused."""
    assert relevance(result(1, 0.0, 1000.0, -1000.0)) == [0.5, 1.0, 0.0]
    yes, no = math.log(0.3), math.log(0.1)
    assert relevance(result(2, yes, no)) == [pytest.approx(0.75)]
    with pytest.raises(InvalidArgumentError, match="384 values"):
        relevance(result(384, *[0.0] * 384))
