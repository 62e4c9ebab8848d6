"""Untrusted bytes -> one JSON object, held against the standard library's reading of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.errors import HttpError
from sagellm_gateway.jsonbody import decode_object

_TEXTS = ("", "a", ":", "a:b", "[", "{", '"', "\\", '\\":', "\\u003a", "\\\\u003A", "ü:", "\n")


@st.composite
def spelt(draw: st.DrawFn, text: str) -> str:
    """A JSON string that means `text`, in one of the ways to write it."""
    out = []
    for character in text:
        plain = json.dumps(character, ensure_ascii=False)[1:-1]
        escape = f"\\u{ord(character):04x}"
        out.append(draw(st.sampled_from([plain, escape, escape.upper().replace("U", "u")])))
    return f'"{"".join(out)}"'


@st.composite
def documents(draw: st.DrawFn, depth: int = 3) -> str:
    """JSON text, also with keys that are there twice."""
    kind = draw(st.integers(0, 4 if depth else 1))
    if kind == 0:
        return draw(st.sampled_from(["1", "null", "true", "-2.5e3"]))
    if kind == 1:
        return draw(spelt(draw(st.sampled_from(_TEXTS))))
    parts = [draw(documents(depth - 1)) for _ in range(draw(st.integers(0, 3)))]
    space = draw(st.sampled_from(["", " "]))
    if kind == 2:
        return f"[{f',{space}'.join(parts)}]"
    members = [f"{draw(spelt(draw(st.sampled_from(_TEXTS))))}{space}:{part}" for part in parts]
    return "{" + ",".join(members) + "}"


class _TwiceError(Exception):
    pass


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise _TwiceError
    return dict(pairs)


@given(documents())
def test_an_object_is_read_as_it_is_and_no_key_may_be_there_twice(text: str) -> None:
    """However keys and strings are spelt, a document gives what it means, and is refused exactly if an object has a key twice."""
    body = f'{{"root": {text}}}'.encode()
    try:
        meant = json.loads(body, object_pairs_hook=once)
    except _TwiceError:
        with pytest.raises(HttpError, match="same key twice"):
            decode_object(body, 64)
    else:
        assert decode_object(body, 64) == meant


@pytest.mark.parametrize("inside", ["[" * 100, "\\" + '"' + "{" * 100, "}" * 100])
def test_brackets_in_strings_are_no_depth(inside: str) -> None:
    """Text may hold any number of brackets; what is nested too deep is refused, also behind such text."""
    body = {"text": inside, "list": [[1]]}
    assert decode_object(json.dumps(body).encode(), 3) == body
    with pytest.raises(HttpError, match="deeper than 2 levels"):
        decode_object(json.dumps(body).encode(), 2)
