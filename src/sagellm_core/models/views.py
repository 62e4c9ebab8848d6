"""Typed views of a file's metadata: a missing or malformed key is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sagellm_protocol.errors import ModelFileError

__all__ = ["Config", "Metadata"]

_MAX_LAYERS = 4096


class _View:
    """Values by key, checked for their type. `default` None makes the key required."""

    def _lookup(self, key: str) -> Any:
        raise NotImplementedError

    def _where(self, key: str) -> str:
        raise NotImplementedError

    def has(self, key: str) -> bool:
        """Whether the key has a value other than null."""
        return self._lookup(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number.

        Raises:
            ModelFileError: missing without a default, or no whole number.
        """
        value = self._lookup(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelFileError(
                f"{self._where(key)} is {_shown(value)}, not a whole number: the model file is malformed"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number.

        Raises:
            ModelFileError: missing without a default, or no finite number.
        """
        value = self._lookup(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelFileError(f"{self._where(key)} is {_shown(value)}, not a number: the model file is malformed")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return text.

        Raises:
            ModelFileError: missing without a default, or no text.
        """
        value = self._lookup(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise ModelFileError(f"{self._where(key)} is {_shown(value)}, not text: the model file is malformed")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a truth value.

        Raises:
            ModelFileError: present and no truth value.
        """
        value = self._lookup(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelFileError(
                f"{self._where(key)} is {_shown(value)}, not true or false: the model file is malformed"
            )
        return value


class Metadata(_View):
    """GGUF metadata; keys are given without the architecture's prefix.

    Attributes:
        architecture: `general.architecture`.
        shapes: tensor name -> shape.
        context_length: the caller's wish, None if there is none.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        vector: Callable[[str], tuple[float, ...]],
        context_length: int | None = None,
    ) -> None:
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelFileError("GGUF metadata has no general.architecture: the file is no model, or malformed")
        self.architecture, self.shapes, self.context_length = architecture, shapes, context_length
        self._values, self._vector = values, vector

    def _where(self, key: str) -> str:
        return f"GGUF metadata {self.architecture}.{key}"

    def _lookup(self, key: str) -> Any:
        value = self._values.get(f"{self.architecture}.{key}")
        if isinstance(value, Sequence) and not isinstance(value, str) and 0 < len(value) <= _MAX_LAYERS:
            first = value[0]
            if all(item == first for item in value):  # some converters write one value a layer
                return first
        return value

    def factors(self, tensor: str) -> tuple[float, ...] | None:
        """Return a small F32 tensor as numbers, None if the file has none of that name.

        Raises:
            ModelFileError: it is not a short vector of positive float32.
        """
        if tensor not in self.shapes:
            return None
        values = self._vector(tensor)
        if not all(math.isfinite(v) and v > 0 for v in values):
            raise ModelFileError(f"tensor {tensor!r} holds values that are not positive: the file is malformed")
        return values

    def flags(self, key: str) -> tuple[bool, ...] | None:
        """Return one truth value a layer, None if the key is absent or no list.

        Raises:
            ModelFileError: a list of something else.
        """
        value = self._values.get(f"{self.architecture}.{key}")
        if not isinstance(value, Sequence) or isinstance(value, str):
            return None
        if len(value) > _MAX_LAYERS or not all(isinstance(item, int) for item in value):
            raise ModelFileError(f"{self._where(key)} is not one truth value a layer: the model file is malformed")
        return tuple(bool(item) for item in value)

    def vocab_size(self) -> int:
        """Rows of the embedding.

        Raises:
            ModelFileError: the file has no token embedding.
        """
        if "token_embd.weight" not in self.shapes:
            raise ModelFileError("the file has no tensor 'token_embd.weight': it is no language model")
        return self.shapes["token_embd.weight"][0]


class Config(_View):
    """A config.json (its text part), and the names of the tensors that stand beside it."""

    def __init__(
        self, values: Mapping[str, Any], tensors: Collection[str] = (), context_length: int | None = None
    ) -> None:
        self.values, self.tensors, self.context_length = values, tensors, context_length

    def _where(self, key: str) -> str:
        return f"config.json's {key}"

    def _lookup(self, key: str) -> Any:
        return self.values.get(key)

    def table(self, key: str) -> Config | None:
        """Return a nested object, None if absent.

        Raises:
            ModelFileError: present and no object.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ModelFileError(f"config.json's {key} is {_shown(value)}, not an object: the model file is malformed")
        return Config(value, self.tensors, self.context_length)

    def items(self, key: str) -> list[Any] | None:
        """Return a list, None if absent.

        Raises:
            ModelFileError: present and no list.
        """
        value = self.values.get(key)
        if value is None or isinstance(value, list):
            return value
        raise ModelFileError(f"config.json's {key} is {_shown(value)}, not a list: the model file is malformed")

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """Return a list of finite numbers, None if absent.

        Raises:
            ModelFileError: present and something else.
        """
        values = self.items(key)
        if values is None:
            return None
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
            raise ModelFileError(f"config.json's {key} holds something that is no number: the model file is malformed")
        return tuple(float(v) for v in values)

    def tied(self) -> bool:
        """Whether logits use the embedding: as configured, else whether the file lacks a head."""
        lacks_head = not any(name.endswith("lm_head.weight") for name in self.tensors)
        return self.flag("tie_word_embeddings", lacks_head)


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
