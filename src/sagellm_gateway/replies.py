"""Shapes of answers, for the OpenAPI document. The handlers build plain dictionaries, tests hold them against these."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = [
    "AnthropicErrorReply",
    "BareErrorReply",
    "ChatCompletionReply",
    "CompletionReply",
    "EmbeddingsReply",
    "MessageReply",
    "ModelsReply",
    "OllamaErrorReply",
    "OpenAIErrorReply",
    "ResponseReply",
]


class OpenAIErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong: all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorReply(msgspec.Struct, kw_only=True):
    """A failure in the OpenAI shape."""

    error: OpenAIErrorDetail


class AnthropicErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorReply(msgspec.Struct, kw_only=True):
    """A failure in the Anthropic shape."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class OllamaErrorReply(msgspec.Struct, kw_only=True):
    """A failure in the Ollama shape."""

    error: str


class BareErrorReply(msgspec.Struct, kw_only=True):
    """A failure of our own routes."""

    detail: str
    code: str
    param: str | None
    request_id: str


class UsageReply(msgspec.Struct, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class CalledFunction(msgspec.Struct, kw_only=True):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class CallReply(msgspec.Struct, kw_only=True):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessageReply(msgspec.Struct, kw_only=True):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[CallReply] | None = None


class ChatChoiceReply(msgspec.Struct, kw_only=True):
    """One choice."""

    index: int
    message: ChatMessageReply
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "error", "cancelled"] | None


class ChatCompletionReply(msgspec.Struct, kw_only=True):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceReply]
    usage: UsageReply


class CompletionChoiceReply(msgspec.Struct, kw_only=True):
    """One choice."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "error", "cancelled"] | None


class CompletionReply(msgspec.Struct, kw_only=True):
    """A completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoiceReply]
    usage: UsageReply


class ModelReply(msgspec.Struct, kw_only=True):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: str
    context_length: int | None


class ModelsReply(msgspec.Struct, kw_only=True):
    """The served models."""

    object: Literal["list"]
    data: list[ModelReply]


class EmbeddingReply(msgspec.Struct, kw_only=True):
    """One vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsReply(msgspec.Struct, kw_only=True):
    """Vectors, in the order of the input."""

    object: Literal["list"]
    data: list[EmbeddingReply]
    model: str
    usage: dict[str, int]


class MessageReply(msgspec.Struct, kw_only=True):
    """A message in the Anthropic shape."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, int]


class ResponseReply(msgspec.Struct, kw_only=True):
    """A response; further fields echo the request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    usage: dict[str, Any] | None
