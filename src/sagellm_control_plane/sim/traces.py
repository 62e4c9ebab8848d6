"""Requests for the simulator: readers of the two public trace formats, and synthetic arrivals."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["SimRequest", "poisson", "read_azure", "read_mooncake", "read_trace", "speed_up"]

MOONCAKE_BLOCK = 512


class SimRequest(msgspec.Struct, gc=False):
    """One request of a trace.

    Attributes:
        at: arrival, seconds from the start of the trace.
        prompt_tokens: input length.
        output_tokens: output length; the simulated engine produces exactly these, the policies do not know it.
        blocks: names of the prompt's blocks; equal names are equal prefixes.
        block_tokens: tokens of one of them, 0 without prefix information.
        priority: a band, 0 the most urgent.
        tenant: whose fair share this counts on.
        model: whom it asks.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[bytes, ...] = ()
    block_tokens: int = 0
    priority: int = 2
    tenant: str = ""
    model: str = "sim"


_Length = Annotated[int, msgspec.Meta(ge=0)]


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0.0)]
    input_length: _Length
    output_length: _Length
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]]


def read_mooncake(lines: Iterable[bytes | str]) -> Iterator[SimRequest]:
    """Yield the requests of a Mooncake trace (JSON lines: timestamp in ms, lengths, one id for each block of 512 tokens).

    Raises:
        InvalidArgumentError: a line is not of that format; the message has its number.
    """
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise InvalidArgumentError(f"line {number} is not of the Mooncake format: {error}", param="trace") from None
        # Only full blocks can be shared: the id of a last partial block stands for fewer tokens.
        full = row.hash_ids[: row.input_length // MOONCAKE_BLOCK]
        yield SimRequest(
            row.timestamp / 1000.0,
            max(row.input_length, 1),
            max(row.output_length, 1),
            tuple(i.to_bytes(8, "big") for i in full),
            MOONCAKE_BLOCK,
        )


def _length(text: str) -> int:
    tokens = int(text)
    if tokens < 0:
        raise ValueError(f"a length of {tokens} tokens")
    return tokens


def read_azure(lines: Iterable[str]) -> Iterator[SimRequest]:
    """Yield the requests of an Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens).

    Raises:
        InvalidArgumentError: a row is not of that format; the message has its number.
    """
    start: datetime | None = None
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            # Seven digits of a second: Python reads six.
            when = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26].removesuffix("Z").replace("T", " "))
            prompt, output = _length(row["ContextTokens"]), _length(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(f"line {number} is not of the Azure format: {error}", param="trace") from None
        start = start or when
        yield SimRequest((when - start).total_seconds(), max(prompt, 1), max(output, 1))


def read_trace(path: Path) -> list[SimRequest]:
    """Read a trace; ``.jsonl`` is Mooncake's format, ``.csv`` Azure's. Sorted by arrival.

    Raises:
        InvalidArgumentError: another suffix, no text, or a line of another format.
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise InvalidArgumentError(
            f"trace {path.name!r} has the suffix {suffix!r}: .jsonl (Mooncake) and .csv (Azure) are read", param="trace"
        )
    with path.open(encoding="utf-8", newline="") as lines:
        try:
            requests = list(read_mooncake(lines) if suffix == ".jsonl" else read_azure(lines))
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"trace {path.name!r} is not text: {error}", param="trace") from None
    if not requests:
        raise InvalidArgumentError(f"trace {path.name!r} has no requests", param="trace")
    return sorted(requests, key=lambda request: request.at)


def speed_up(requests: Sequence[SimRequest], factor: float) -> list[SimRequest]:
    """Return the requests with all arrivals `factor` times closer."""
    return [msgspec.structs.replace(request, at=request.at / factor) for request in requests]


def poisson(
    rate: float,
    count: int,
    *,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    groups: int = 0,
    block_tokens: int = 16,
) -> list[SimRequest]:
    """Return Poisson arrivals of `rate` a second with exponential lengths of the given means.

    With `groups`, each request shares the first half of its prompt with the others of one of that many groups.
    """
    rng = random.Random(seed)  # noqa: S311 - synthetic load
    at = 0.0
    out = []
    for serial in range(count):
        at += rng.expovariate(rate)
        prompt = max(1, round(rng.expovariate(1.0 / prompt_tokens)))
        output = max(1, round(rng.expovariate(1.0 / output_tokens)))
        blocks: tuple[bytes, ...] = ()
        if groups:
            total = prompt // block_tokens
            group = rng.randrange(groups)
            shared = total // 2
            names = [(group << 32) + i for i in range(shared)]
            names += [(1 << 62) + (serial << 20) + i for i in range(total - shared)]
            blocks = tuple(name.to_bytes(8, "big") for name in names)
        out.append(SimRequest(at, prompt, output, blocks, block_tokens if groups else 0))
    return out
