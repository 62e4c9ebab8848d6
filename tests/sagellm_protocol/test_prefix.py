"""Names of prompts' blocks: of token ids, and of text where these are not known."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from sagellm_protocol.prefix import block_hashes, text_hashes

prompts = st.binary(max_size=64)


@given(prompts, prompts, prompts, st.integers(1, 9), st.sampled_from(["", "salt"]))
def test_texts_share_the_names_of_what_they_share_and_no_more(
    common: bytes, one: bytes, other: bytes, size: int, salt: str
):
    """Two texts have as many equal names as they have equal full blocks at their beginning; the rest of a block is no block."""
    first, second = common + one, common + other
    names = text_hashes(first, block_bytes=size, salt=salt), text_hashes(second, block_bytes=size, salt=salt)
    assert [len(n) for n in names] == [len(first) // size, len(second) // size]
    equal = 0
    while (equal + 1) * size <= min(len(first), len(second)) and first[: (equal + 1) * size] == second[
        : (equal + 1) * size
    ]:
        equal += 1
    assert names[0][:equal] == names[1][:equal]
    assert not set(names[0][equal:]) & set(names[1][equal:])


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.integers(1, 8))
def test_ids_are_named_as_their_bytes_are(ids: list[int], size: int):
    """A block of ids has the name of the same 32-bit words as text: one chain, two ways to write it."""
    words = struct.pack(f"<{len(ids)}i", *ids)
    assert block_hashes(ids, block_size=size) == text_hashes(words, block_bytes=4 * size)
