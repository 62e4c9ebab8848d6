"""A log of events and the commands that they led to; replaying the events gives the same commands.

One JSON line for each event, after a header with the configuration and the seed. The core has no clock and no random source of its
own, so the log is all that a decision depended on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import IO

import msgspec

from sagellm_control_plane.config import CoreConfig
from sagellm_control_plane.events import Command, Event
from sagellm_control_plane.state import ControlState
from sagellm_control_plane.view import RandomSource

__all__ = ["DecisionLog", "Difference", "replay"]

VERSION = 1


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First line of a log."""

    version: int
    seed: int
    config: CoreConfig


class Entry(msgspec.Struct, frozen=True):
    """One event with its commands."""

    now: float
    event: Event
    commands: list[Command]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Where a replay left the log."""

    line: int
    event: Event
    recorded: list[Command]
    replayed: list[Command]


class DecisionLog:
    """Writes a log to a binary file; the encoding costs a few microseconds an event."""

    def __init__(self, sink: IO[bytes], config: CoreConfig, seed: int) -> None:
        self._encoder = msgspec.json.Encoder()
        self._sink = sink
        self._write(Header(version=VERSION, seed=seed, config=config))

    def append(self, now: float, event: Event, commands: list[Command]) -> None:
        """Record an event."""
        self._write(Entry(now, event, commands))

    def _write(self, value: object) -> None:
        self._sink.write(self._encoder.encode(value) + b"\n")


def replay(lines: Iterable[bytes], random_source: Callable[[int], RandomSource]) -> list[Difference]:
    """Run a log's events through a new core and return where its commands differ; an identical run returns nothing.

    Args:
        lines: of the log, header first.
        random_source: makes a generator from the log's seed.

    Raises:
        msgspec.ValidationError: a line is not of a log, or of another version.
    """
    iterator = iter(lines)
    header = msgspec.json.decode(next(iterator), type=Header)
    if header.version != VERSION:
        raise msgspec.ValidationError(f"decision log of version {header.version}: this program reads version {VERSION}")
    state = ControlState(header.config, random_source(header.seed))
    decoder = msgspec.json.Decoder(Entry)
    differences = []
    for number, line in enumerate(iterator, start=2):
        entry = decoder.decode(line)
        commands = state.on_event(entry.event, entry.now)
        if commands != entry.commands:
            differences.append(Difference(line=number, event=entry.event, recorded=entry.commands, replayed=commands))
    return differences
