"""What the client returns: the OpenAI JSON as a read-only mapping, with the parts that everyone needs as attributes."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["ChatResult", "CompletionResult", "Delta", "EmbeddingResult", "Result"]


class Result(Mapping[str, Any]):
    """A reply: the server's JSON, unchanged; ``str(result)`` is its text.

    Attributes:
        latency_ms: from sending the request to having the whole reply, measured by the client.
    """

    __slots__ = ("_json", "latency_ms", "parsed")

    def __init__(self, json: dict[str, Any], *, latency_ms: float = 0.0, parsed: Any = None) -> None:
        self._json = json
        self.latency_ms = latency_ms
        self.parsed = parsed

    def __getitem__(self, key: str) -> Any:
        return self._json[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._json)

    def __len__(self) -> int:
        return len(self._json)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._json!r})"

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return ""

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the request; empty where the server sent none."""
        return self._json.get("usage") or {}

    @property
    def model(self) -> str:
        """The model that answered."""
        return str(self._json.get("model", ""))

    @property
    def request_id(self) -> str:
        """The server's id of the request."""
        return str(self._json.get("id", ""))

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        choice = _first_choice(self._json)
        return choice.get("finish_reason")


class ChatResult(Result):
    """A chat completion."""

    __slots__ = ()

    @property
    def message(self) -> dict[str, Any]:
        """The first choice's message."""
        message: dict[str, Any] = _first_choice(self._json).get("message") or {}
        return message

    @property
    def text(self) -> str:
        """The message's content; empty where the model only called tools."""
        return self.message.get("content") or ""

    @property
    def reasoning(self) -> str:
        """What the model thought before it answered, where it does."""
        return self.message.get("reasoning_content") or ""

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls that the model made."""
        return self.message.get("tool_calls") or []


class CompletionResult(Result):
    """A text completion."""

    __slots__ = ()

    @property
    def text(self) -> str:
        """The first choice's text."""
        return _first_choice(self._json).get("text") or ""


class EmbeddingResult(Result):
    """Vectors, one for each input, in order."""

    __slots__ = ()

    @property
    def vectors(self) -> list[list[float]]:
        """The vectors as lists of floats, whatever encoding was asked for."""
        rows = sorted(self._json.get("data", ()), key=lambda row: row.get("index", 0))
        return [_vector(row["embedding"]) for row in rows]

    @property
    def text(self) -> str:
        """A vector has no text: a short description, for ``str``."""
        vectors = self._json.get("data", ())
        return f"{len(vectors)} vectors"


class Delta(Result):
    """A piece of a stream: one chunk of the server; ``str(delta)`` is the text that it adds."""

    __slots__ = ()

    @property
    def text(self) -> str:
        """The text that the first choice gained."""
        choice = _first_choice(self._json)
        if "delta" in choice:
            return (choice["delta"] or {}).get("content") or ""
        return choice.get("text") or ""

    @property
    def reasoning(self) -> str:
        """The thought that the first choice gained."""
        return (_first_choice(self._json).get("delta") or {}).get("reasoning_content") or ""

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """Pieces of tool calls."""
        return (_first_choice(self._json).get("delta") or {}).get("tool_calls") or []


def _first_choice(json: dict[str, Any]) -> dict[str, Any]:
    choices = json.get("choices") or [{}]
    choice: dict[str, Any] = choices[0]
    return choice


def _vector(embedding: str | list[float]) -> list[float]:
    if isinstance(embedding, str):
        data = base64.b64decode(embedding)
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    return list(embedding)
