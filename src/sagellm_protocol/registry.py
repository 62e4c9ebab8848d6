"""The types that may stand in an envelope, by name."""

from __future__ import annotations

from types import ModuleType

import msgspec

from sagellm_protocol import embedding, engine, errors, generation, handover, kv, metrics, sampling, types

__all__ = ["ALIASES", "TYPES"]

ALIASES: dict[str, str] = {
    "StartEvent": "StreamEventStart",
    "DeltaEvent": "StreamEventDelta",
    "EndEvent": "StreamEventEnd",
    "Sampling": "SamplingParams",
}
"""Older or shorter names, accepted on decoding and never written."""


def _structs(module: ModuleType) -> dict[str, type[msgspec.Struct]]:
    members = ((name, getattr(module, name)) for name in module.__all__)
    return {
        name: member
        for name, member in members
        if isinstance(member, type) and issubclass(member, msgspec.Struct) and member.__name__ == name
    }


TYPES: dict[str, type[msgspec.Struct]] = {
    name: member
    for module in (types, metrics, errors, kv, sampling, generation, engine, embedding, handover)
    for name, member in _structs(module).items()
}
"""Every public struct of the protocol by its name."""
