"""Special tokens: cut out where a template put them, text where a user typed them."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from sagellm_core.text.specials import Guard, SpecialToken, SpecialTokens

_NAMES = ["<s>", "</s>", "<|im_end|>", "<|im_start|>", "[INST]", "<|a|>"]
_SPECIALS = SpecialTokens(SpecialToken(100 + i, name) for i, name in enumerate(_NAMES))
_PARTS = st.lists(
    st.one_of(
        st.sampled_from([*_NAMES, "<|im_", "end|>", "<", "|>", ">", "[INS", "T]", "s>", "<s", " "]), st.text(max_size=3)
    )
)


def test_split_takes_the_longest_and_strips() -> None:
    """The longest token at a place wins; lstrip and rstrip swallow white space around."""
    specials = SpecialTokens([SpecialToken(1, "<a>"), SpecialToken(2, "<a><b>"), SpecialToken(3, "<c>", True, True)])
    assert list(specials.split("x<a><b><a>y")) == ["x", 2, 1, "y"]
    assert list(specials.split(" x  <c> \n y ")) == [" x", 3, "y "]
    assert list(SpecialTokens([]).split("a<s>")) == ["a<s>"]
    assert list(specials.split("")) == []


@given(parts=_PARTS)
def test_split_pieces_are_the_text(parts: list[str]) -> None:
    """Pieces, with tokens spelled, join to the text; no plain piece holds a special token."""
    text = "".join(parts)
    names = {token.id: token.content for token in _SPECIALS}
    pieces = list(_SPECIALS.split(text))
    assert "".join(names[p] if isinstance(p, int) else p for p in pieces) == text
    assert not any(name in p for p in pieces if isinstance(p, str) for name in _NAMES)


@given(before=_PARTS, user=_PARTS, behind=_PARTS)
@example(before=["<|im_"], user=["end|>"], behind=[])
@example(before=[], user=["<|im_end|"], behind=[">"])
@example(before=["<"], user=["s>\ue000"], behind=["<s>"])
def test_user_text_never_becomes_a_token(before: list[str], user: list[str], behind: list[str]) -> None:
    """Whatever a user types, a template around it gives its own tokens and no others, and the user's text arrives unchanged."""
    typed = "".join(user)
    head, tail = "".join(before), "".join(behind)
    guard = Guard(_SPECIALS, [typed])
    pieces = list(guard.split(f"{head}<|im_start|>{guard.protect(typed)}<|im_end|>{tail}"))
    own = [token for text in (f"{head}<|im_start|>", f"<|im_end|>{tail}") for token in _SPECIALS.split(text)]
    assert [p for p in pieces if isinstance(p, int)] == [p for p in own if isinstance(p, int)]
    names = {token.id: token.content for token in _SPECIALS}
    assert "".join(
        names[p] if isinstance(p, int) else p for p in pieces
    ) == f"{head}<|im_start|>{typed}<|im_end|>{tail}".replace("\ue000" if "\ue000" not in typed else "\ue001", "")


@given(
    parts=_PARTS,
    behind=st.sampled_from([">", "|>", "end|>", "NST]", ""]),
    before=st.sampled_from(["<", "<|im_", "[", "</", ""]),
)
def test_no_token_grows_over_the_border(parts: list[str], behind: str, before: str) -> None:
    """Template text that touches user text makes no token together with it."""
    typed = "".join(parts)
    guard = Guard(_SPECIALS, [typed])
    if typed:
        assert all(isinstance(piece, str) for piece in guard.split(before + guard.protect(typed) + behind))


def test_guard_reaches_into_data() -> None:
    """Keys and values of nested data are protected, other values are kept."""
    guard = Guard(_SPECIALS, ["<s>"])
    out = guard.protect_all({"<s>": ["<s>", 1, None, {"a": "</s>"}]})
    text = repr(out)
    assert "<s>" not in text
    assert "</s>" not in text
    assert list(guard.split(next(iter(out)))) == ["<s>"]
