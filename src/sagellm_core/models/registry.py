"""Which family a file belongs to."""

from __future__ import annotations

from collections.abc import Callable

from sagellm_core.models import gemma2, gemma3, granite, llama, mixtral, olmo2, phi3, qwen
from sagellm_core.models.base import Family
from sagellm_protocol.errors import ModelFileError

__all__ = ["FAMILIES", "family_of_gguf", "family_of_hf"]

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mixtral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    granite.FAMILY,
    olmo2.FAMILY,
)


def family_of_gguf(architecture: str) -> Family:
    """Return the family of a GGUF file's `general.architecture`.

    Raises:
        ModelFileError: unknown; the message lists the known ones.
    """
    return _find(architecture, lambda family: family.gguf)


def family_of_hf(model_type: str) -> Family:
    """Return the family of a config.json's `model_type`.

    Raises:
        ModelFileError: unknown; the message lists the known ones.
    """
    return _find(model_type, lambda family: family.hf)


def _find(name: str, names: Callable[[Family], tuple[str, ...]]) -> Family:
    for family in FAMILIES:
        if name in names(family):
            return family
    known = ", ".join(sorted({n for family in FAMILIES for n in names(family)}))
    raise ModelFileError(f"architecture {name!r} is not supported: {known} are")
