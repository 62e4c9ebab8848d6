"""One renderer for failures: the tree of `sagellm_protocol.errors` and HTTP's own refusals become a status and a body.

Four shapes: OpenAI, Anthropic, Ollama and bare. A body of a 5xx holds no path, address or repr of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from sagellm_protocol.errors import ErrorCode, SageError

__all__ = [
    "HttpError",
    "anthropic_body",
    "bare_body",
    "ollama_body",
    "openai_body",
    "render",
    "retry_after",
    "status_of",
]

Shape = Callable[[SageError, str], dict[str, Any]]

# Code -> (HTTP status, OpenAI type, OpenAI code, Anthropic type).
_TABLE: dict[ErrorCode, tuple[int, str, str, str]] = {
    ErrorCode.INVALID_ARGUMENT: (400, "invalid_request_error", "invalid_value", "invalid_request_error"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "invalid_request_error",
    ),
    ErrorCode.NOT_IMPLEMENTED: (400, "invalid_request_error", "unsupported_parameter", "invalid_request_error"),
    ErrorCode.MODEL_NOT_FOUND: (404, "invalid_request_error", "model_not_found", "not_found_error"),
    ErrorCode.MODEL_FILE: (500, "server_error", "model_file", "api_error"),
    ErrorCode.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key", "authentication_error"),
    ErrorCode.PERMISSION_DENIED: (403, "invalid_request_error", "permission_denied", "permission_error"),
    ErrorCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
    ErrorCode.UNAVAILABLE: (503, "server_error", "unavailable", "overloaded_error"),
    ErrorCode.ENGINE_DIED: (503, "server_error", "engine_died", "overloaded_error"),
    ErrorCode.DEADLINE_EXCEEDED: (504, "server_error", "deadline_exceeded", "timeout_error"),
    ErrorCode.CANCELLED: (499, "invalid_request_error", "cancelled", "api_error"),
    ErrorCode.KV_TRANSFER_FAILED: (503, "server_error", "kv_transfer_failed", "overloaded_error"),
    ErrorCode.UNSUPPORTED_VERSION: (502, "server_error", "unsupported_version", "api_error"),
    ErrorCode.INTERNAL: (500, "server_error", "internal_error", "api_error"),
}

# Faults of the server whose message may name a file or an address: the log has it, the body a fixed sentence.
_HIDDEN = {
    ErrorCode.INTERNAL: "the server failed on this request; its log has the details under the request id",
    ErrorCode.MODEL_FILE: "the model's file cannot be read; the server's log has the details under the request id",
}


class HttpError(SageError):
    """A refusal that only HTTP knows (405, 413, 415, …): carries its own status and code."""

    code = ErrorCode.INVALID_ARGUMENT

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.status = status
        self.http_code = code
        self.headers = headers


_ANTHROPIC_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def status_of(error: SageError) -> int:
    """Return the HTTP status of `error`."""
    return error.status if isinstance(error, HttpError) else _TABLE[error.code][0]


def message_of(error: SageError) -> str:
    """Return the text that a client may see."""
    return error.message if isinstance(error, HttpError) else _HIDDEN.get(error.code, error.message)


def openai_body(error: SageError, request_id: str) -> dict[str, Any]:  # noqa: ARG001  (one signature for all shapes)
    """OpenAI: an object with message, type, param and code, all four always there."""
    if isinstance(error, HttpError):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        code = error.http_code
    else:
        _, kind, code, _ = _TABLE[error.code]
    return {"error": {"message": message_of(error), "type": kind, "param": error.param, "code": code}}


def anthropic_body(error: SageError, request_id: str) -> dict[str, Any]:
    """Anthropic: ``{"type": "error", "error": {type, message}, "request_id"}``."""
    if isinstance(error, HttpError):
        kind = _ANTHROPIC_OF_STATUS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    else:
        kind = _TABLE[error.code][3]
    return {"type": "error", "error": {"type": kind, "message": message_of(error)}, "request_id": request_id}


def ollama_body(error: SageError, request_id: str) -> dict[str, Any]:  # noqa: ARG001
    """Ollama: ``{"error": "text"}``."""
    return {"error": message_of(error)}


def bare_body(error: SageError, request_id: str) -> dict[str, Any]:
    """Our own routes: ``{"detail", "code", "request_id"}``."""
    code = error.http_code if isinstance(error, HttpError) else error.code.value
    return {"detail": message_of(error), "code": code, "param": error.param, "request_id": request_id}


def retry_after(error: SageError) -> list[tuple[bytes, bytes]]:
    """Return the extra headers of `error`: Retry-After for 429 and 503, and what an `HttpError` brings."""
    headers = list(error.headers) if isinstance(error, HttpError) else []
    seconds = error.retry_after_s
    if seconds is None and status_of(error) == 503:
        seconds = 1.0
    if seconds is not None:
        headers.append((b"retry-after", str(max(1, round(seconds))).encode()))
    return headers


def render(error: SageError, shape: Shape, request_id: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Return status, extra headers and JSON body of `error`."""
    return status_of(error), retry_after(error), msgspec.json.encode(shape(error, request_id))
