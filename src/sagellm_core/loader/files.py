"""Mapping a weight file into memory."""

from __future__ import annotations

import mmap
from pathlib import Path

from sagellm_protocol.errors import ModelFileError

__all__ = ["map_file"]


def map_file(path: Path, *, least: int) -> mmap.mmap:
    """Map `path` read-only; it stays mapped as long as something refers to the result.

    Raises:
        ModelFileError: it is missing, no regular file, unreadable, or shorter than `least` bytes.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ModelFileError(f"{path} is not a file: pass a model file")
        if size < least:
            raise ModelFileError(f"{path.name} has {size} bytes, too few for a model: fetch it again")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(
            f"{path} does not exist: check the path, or fetch the model with `sage-llm pull`"
        ) from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
