"""Every error that crosses a floor, and its code on the wire.

::

    SageError
    ├── InvalidArgumentError          invalid_argument          the request is wrong; `param` names the field
    │   ├── ContextLengthError        context_length_exceeded   prompt + output do not fit; carries both numbers
    │   └── UnsupportedError          not_implemented           a parameter or feature that we refuse
    ├── ModelNotFoundError            model_not_found           no engine and no file of that name
    ├── ModelFileError                model_file                missing, truncated or malformed weights
    ├── UnauthenticatedError          unauthenticated           no key, or an unknown one
    ├── PermissionDeniedError         permission_denied         the key's role does not cover this
    ├── ResourceExhaustedError        resource_exhausted        over a rate, a budget or the memory plan
    ├── UnavailableError              unavailable               no healthy engine now; try again
    │   └── EngineDiedError           engine_died               the engine ended while it held the request
    ├── DeadlineExceededError         deadline_exceeded         the request's own deadline passed
    ├── CancelledRequestError         cancelled                 the client or an operator aborted it
    ├── KVTransferError               kv_transfer_failed        blocks did not arrive whole
    ├── ProtocolVersionError          unsupported_version       the peer speaks another version
    └── InternalError                 internal                  a bug of ours; the message holds no secret

Lower errors (``OSError``, ``msgspec.ValidationError``) are mapped to this tree at one border each, most specific first.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec

__all__ = [
    "CancelledRequestError",
    "ContextLengthError",
    "DeadlineExceededError",
    "EngineDiedError",
    "Error",
    "ErrorCode",
    "InternalError",
    "InvalidArgumentError",
    "KVTransferError",
    "ModelFileError",
    "ModelNotFoundError",
    "PermissionDeniedError",
    "ProtocolVersionError",
    "ResourceExhaustedError",
    "SageError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
]


class ErrorCode(str, Enum):
    """Stable names of failures, as they stand in JSON."""

    INVALID_ARGUMENT = "invalid_argument"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    NOT_IMPLEMENTED = "not_implemented"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_FILE = "model_file"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    UNAVAILABLE = "unavailable"
    ENGINE_DIED = "engine_died"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    KV_TRANSFER_FAILED = "kv_transfer_failed"
    UNSUPPORTED_VERSION = "unsupported_version"
    INTERNAL = "internal"


class Error(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as data.

    Attributes:
        code: which failure.
        message: the fact, the number and the cure; never a path, a key or a repr of ours.
        retryable: whether the same request may succeed elsewhere or later.
        param: the field of the request that is at fault, if one is.
        retry_after_s: seconds after which a retry makes sense, if known.
    """

    code: ErrorCode
    message: str
    retryable: bool = False
    param: str | None = None
    retry_after_s: float | None = None


class SageError(Exception):
    """Root of the tree; `code` and `retryable` are fixed by the class."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def to_wire(self) -> Error:
        """Return the error as data."""
        return Error(
            code=self.code,
            message=self.message,
            retryable=self.retryable,
            param=self.param,
            retry_after_s=self.retry_after_s,
        )

    @staticmethod
    def from_wire(error: Error) -> SageError:
        """Return the exception that `error` describes: the class is the one that owns its code."""
        cls = _CLASS_OF_CODE[error.code]
        return cls(error.message, param=error.param, retry_after_s=error.retry_after_s)


class InvalidArgumentError(SageError):
    """The request is wrong; `param` names the field."""

    code = ErrorCode.INVALID_ARGUMENT


class ContextLengthError(InvalidArgumentError):
    """Prompt and requested output do not fit the context window."""

    code = ErrorCode.CONTEXT_LENGTH_EXCEEDED


class UnsupportedError(InvalidArgumentError):
    """A parameter or feature that is understood and refused."""

    code = ErrorCode.NOT_IMPLEMENTED


class ModelNotFoundError(SageError):
    """No engine serves, and no file holds, a model of that name."""

    code = ErrorCode.MODEL_NOT_FOUND


class ModelFileError(SageError):
    """A model file is missing, truncated or malformed."""

    code = ErrorCode.MODEL_FILE


class UnauthenticatedError(SageError):
    """No key was given, or one that is not known."""

    code = ErrorCode.UNAUTHENTICATED


class PermissionDeniedError(SageError):
    """The key's role does not cover the call."""

    code = ErrorCode.PERMISSION_DENIED


class ResourceExhaustedError(SageError):
    """Over a rate, a budget, a queue bound or the memory plan."""

    code = ErrorCode.RESOURCE_EXHAUSTED
    retryable = True


class UnavailableError(SageError):
    """No healthy engine can take the request now."""

    code = ErrorCode.UNAVAILABLE
    retryable = True


class EngineDiedError(UnavailableError):
    """The engine ended, or its connection broke, while it held the request."""

    code = ErrorCode.ENGINE_DIED


class DeadlineExceededError(SageError):
    """The request's own deadline passed."""

    code = ErrorCode.DEADLINE_EXCEEDED


class CancelledRequestError(SageError):
    """The client went away, or somebody cancelled the request."""

    code = ErrorCode.CANCELLED


class KVTransferError(SageError):
    """Blocks of a KV cache did not arrive whole."""

    code = ErrorCode.KV_TRANSFER_FAILED
    retryable = True


class ProtocolVersionError(SageError):
    """The peer speaks a version of the protocol that we do not."""

    code = ErrorCode.UNSUPPORTED_VERSION


class InternalError(SageError):
    """A bug of ours."""

    code = ErrorCode.INTERNAL


def _walk(cls: type[SageError]) -> list[type[SageError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _walk(child))]


# Reversed, so that InternalError (a leaf) and not the root owns "internal".
_CLASS_OF_CODE: dict[ErrorCode, type[SageError]] = {
    cls.code: cls for cls in reversed(_walk(SageError)) if cls is not SageError
}
