"""Python types as JSON schemas and back: for structured output, and for tools given as plain functions."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["parse_output", "response_format_of", "tools_of"]


def response_format_of(wanted: Any) -> dict[str, Any]:
    """Return the OpenAI ``response_format`` for a dict (kept as it is), a dataclass, a msgspec Struct, a TypedDict or a pydantic model.

    Raises:
        InvalidArgumentError: a type that has no JSON schema.
    """
    if isinstance(wanted, dict):
        return wanted
    return {
        "type": "json_schema",
        "json_schema": {"name": getattr(wanted, "__name__", "output"), "schema": _schema(wanted), "strict": True},
    }


def parse_output(wanted: Any, text: str) -> Any:
    """Return `text` as what `wanted` describes: an instance of the type, or plain JSON for a dict.

    Raises:
        InvalidArgumentError: the text is not what was asked for (it was cut at max_tokens, say).
    """
    try:
        if hasattr(wanted, "model_validate_json"):
            return wanted.model_validate_json(text)
        if isinstance(wanted, dict):
            return json.loads(text)
        return msgspec.json.decode(text, type=wanted)
    except (ValueError, msgspec.DecodeError) as error:
        raise InvalidArgumentError(
            f"the output is not what response_format asks for ({error}): was it cut? raise max_tokens",
            param="response_format",
        ) from error


def tools_of(tools: Sequence[dict[str, Any] | Callable[..., Any]]) -> list[dict[str, Any]]:
    """Return OpenAI tool definitions; a function becomes one by its name, docstring and annotations."""
    return [tool if isinstance(tool, dict) else _tool(tool) for tool in tools]


def _tool(function: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    fields: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidArgumentError(
                f"tool {function.__name__} takes *{name}: a tool needs named parameters", param="tools"
            )
        kind = hints.get(name, Any)
        fields.append((name, kind) if parameter.default is parameter.empty else (name, kind, parameter.default))
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": inspect.getdoc(function) or "",
            "parameters": _schema(msgspec.defstruct("Parameters", fields, kw_only=True, forbid_unknown_fields=True)),
        },
    }


def _schema(kind: Any) -> dict[str, Any]:
    if hasattr(kind, "model_json_schema"):
        schema: dict[str, Any] = kind.model_json_schema()
        return schema
    try:
        (schema,), components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    except TypeError as error:
        raise InvalidArgumentError(
            f"{kind!r} has no JSON schema ({error}): use a dataclass, a msgspec Struct, a TypedDict or a pydantic model"
        ) from error
    if "$ref" in schema:
        schema = components.pop(schema["$ref"].removeprefix("#/$defs/"))
    if components:
        schema = {**schema, "$defs": components}
    return schema
