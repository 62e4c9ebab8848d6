"""The encoder over the `tokenizers` library."""

from __future__ import annotations

from tokenizers import Tokenizer

from sagellm_protocol.errors import ModelFileError

__all__ = ["HFEncoder"]


class HFEncoder:
    """Encodes plain text with a tokenizer.json from which the special tokens were taken out. Safe to use from threads."""

    def __init__(self, document: bytes) -> None:
        """Load a tokenizer.json.

        Raises:
            ModelFileError: `tokenizers` refuses it.
        """
        try:
            self._tokenizer = Tokenizer.from_buffer(document)
        except Exception as error:
            raise ModelFileError(f"the tokenizer is malformed ({error}): fetch or convert the model again") from error
        # Embedding models ship files that cut and pad every text; lengths are the caller's business.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, None for an unused id."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token
