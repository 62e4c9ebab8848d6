"""Port to the models on disk, plugged in by whoever composes the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec

from sagellm_protocol.errors import UnsupportedError

__all__ = ["LibraryModel", "ModelLibrary", "NoLibrary", "PullProgress"]


class LibraryModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model on disk.

    Attributes:
        name: as it is pulled and served.
        size: bytes.
        digest: hex SHA-256 of the weights.
        modified_at: unix seconds.
        details: family, parameter_size, quantization_level, format and the like.
    """

    name: str
    size: int = 0
    digest: str = ""
    modified_at: float = 0.0
    details: dict[str, Any] = {}


class PullProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a pull; `total` and `completed` are bytes where they are known."""

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class ModelLibrary(Protocol):
    """What the routes that manage models need. Calls run off the event loop where they block."""

    def models(self) -> Sequence[LibraryModel]:
        """Return what is on disk."""
        ...

    def pull(self, name: str) -> AsyncIterator[PullProgress]:
        """Fetch a model; the last item has the status ``success``.

        Raises:
            ModelNotFoundError: no source has it.
        """
        ...

    async def delete(self, name: str) -> None:
        """Remove a model from disk.

        Raises:
            ModelNotFoundError: it is not there.
        """
        ...

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name.

        Raises:
            ModelNotFoundError: `source` is not there.
        """
        ...


class NoLibrary:
    """A server that manages no models on disk."""

    def models(self) -> Sequence[LibraryModel]:
        """Return nothing."""
        return ()

    def pull(self, name: str) -> AsyncIterator[PullProgress]:
        """Refuse."""
        raise _refusal("pull", name)

    async def delete(self, name: str) -> None:
        """Refuse."""
        raise _refusal("delete", name)

    async def copy(self, source: str, destination: str) -> None:  # noqa: ARG002  (the port's signature)
        """Refuse."""
        raise _refusal("copy", source)


def _refusal(verb: str, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"this server manages no model files, so it cannot {verb} {name[:128]!r}: use sage-llm on its machine",
        param="model",
    )
