import msgspec
from hypothesis import given
from hypothesis import strategies as st

from sagellm_protocol.deltas import join_deltas
from sagellm_protocol.engine import TokenDelta
from sagellm_protocol.errors import Error, ErrorCode
from sagellm_protocol.generation import TokenLogprob, ToolCallDelta, Usage

FULL = {
    "request_id": "r",
    "token_ids": (1,),
    "logprobs": (TokenLogprob(token_id=1, logprob=-0.5),),
    "prompt_logprobs": (None,),
    "finish_reason": "stop",
    "stop_token_id": 9,
    "error": Error(code=ErrorCode.INTERNAL, message="m"),
    "prompt_tokens": 4,
    "cached_tokens": 2,
    "text": "t",
    "reasoning": "u",
    "text_tokens": 3,
    "tool_calls": (ToolCallDelta(index=0, arguments="{"),),
    "usage": Usage(prompt_tokens=1, completion_tokens=2),
}


@given(st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=1, max_size=6))
def test_nothing_is_lost(steps):
    """Deltas joined say what they said one by one, in order."""
    deltas = [TokenDelta(request_id="r", token_ids=tuple(ids), text="x" * len(ids)) for ids in steps]
    deltas[0] = msgspec.structs.replace(deltas[0], prompt_tokens=4, cached_tokens=2)
    deltas[-1] = msgspec.structs.replace(deltas[-1], finish_reason="stop", stop_token_id=9)
    joined = join_deltas(deltas)
    assert list(joined.token_ids) == [t for ids in steps for t in ids]
    assert joined.text == "x" * len(joined.token_ids)
    assert (joined.prompt_tokens, joined.cached_tokens, joined.finish_reason, joined.stop_token_id) == (4, 2, "stop", 9)


def test_every_field_is_carried():
    """Each field of a delta survives being joined to an empty one; a new field makes this test fail until it does too."""
    assert set(FULL) == set(TokenDelta.__struct_fields__)
    full = TokenDelta(**FULL)
    assert join_deltas([TokenDelta(request_id="r"), full]) == full
    assert join_deltas([full]) is full
