"""Byte-pair encoding over a mapped table (native/bpe.cpp); used through sagellm_core.text.mapped."""

VERSION: int

def build(
    vocab: dict[str, int],
    merges: list[object],
    byte_fallback: bool,
    fuse_unknown: bool,
    ignore_merges: bool,
    unknown: int,
) -> bytes:
    """Return the table. `unknown` is the id of the unknown token, -1 for none.

    Raises:
        ValueError: merges name tokens that are not there, or ids are not usable.
    """

class Table:
    """A table of `build`, in memory that stays as long as this object."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Check the table's size and head.

        Raises:
            ValueError: it is no table.
        """

    def encode(self, words: list[str]) -> list[int]:
        """Return the ids of each word in turn."""

    def token(self, token_id: int) -> str | None:
        """Return a token's text, None for an unused id."""
