"""JSON Schema (draft 2020-12) of every type of the protocol."""

from __future__ import annotations

from typing import Any

import msgspec

from sagellm_protocol.codec import PROTOCOL_VERSION
from sagellm_protocol.registry import ALIASES, TYPES

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """Return one schema of an envelope: ``$defs`` has every type, ``oneOf`` has one branch for each.

    Ranges that a schema of the types cannot say (exactly one of `prompt` and `messages`, two names of one field) are checked on
    decoding.
    """
    _, components = msgspec.json.schema_components(list(TYPES.values()), ref_template="#/$defs/{name}")
    branches = [
        {
            "type": "object",
            "properties": {
                "v": {"const": PROTOCOL_VERSION},
                "type": {"const": name},
                "body": {"$ref": f"#/$defs/{name}"},
            },
            "required": ["v", "type", "body"],
        }
        for name in TYPES
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"sageLLM protocol {PROTOCOL_VERSION}",
        "description": f"Aliases accepted on decoding: {', '.join(f'{a} = {b}' for a, b in ALIASES.items())}.",
        "oneOf": branches,
        "$defs": components,
    }
