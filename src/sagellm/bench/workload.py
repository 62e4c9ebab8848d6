"""What is asked, and when: open loop (Poisson, even, trace) and closed loop. Deterministic by seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Arrival", "Workload", "closed_loop", "open_loop", "prompt_of", "trace"]

_WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
]


@dataclass(frozen=True)
class Arrival:
    """One request to send.

    Attributes:
        at_s: seconds after the start; None where the next free slot of a closed loop takes it.
        prompt_tokens: length that is aimed at.
        output_tokens: exactly so many are asked for (``ignore_eos``).
        prefix: requests with the same prefix share that many tokens of their prompts' beginning.
        shared_tokens: length of the shared beginning.
    """

    at_s: float | None
    prompt_tokens: int
    output_tokens: int
    prefix: int = 0
    shared_tokens: int = 0


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival; `concurrency` bounds a closed loop."""

    name: str
    arrivals: tuple[Arrival, ...]
    concurrency: int | None = None
    seed: int = 0


def closed_loop(
    *, requests: int, concurrency: int, prompt_tokens: int, output_tokens: int, shared_tokens: int = 0, seed: int = 0
) -> Workload:
    """Return `requests` of one size, `concurrency` at a time."""
    one = Arrival(None, prompt_tokens, output_tokens, 0, shared_tokens)
    return Workload(f"closed loop, {concurrency} at a time", (one,) * requests, concurrency, seed)


def open_loop(
    *,
    requests: int,
    rate: float,
    prompt_tokens: int,
    output_tokens: int,
    shared_tokens: int = 0,
    seed: int = 0,
    evenly: bool = False,
) -> Workload:
    """Return requests that arrive at `rate` a second whatever the server does: with exponential gaps (Poisson), or `evenly`."""
    if rate <= 0:
        raise InvalidArgumentError(f"rate is {rate}: it must be above 0", param="rate")
    draw = random.Random(seed)  # noqa: S311 - a workload, not a secret
    at, out = 0.0, []
    for _ in range(requests):
        at += 1 / rate if evenly else draw.expovariate(rate)
        out.append(Arrival(at, prompt_tokens, output_tokens, 0, shared_tokens))
    return Workload(f"{'evenly' if evenly else 'Poisson'}, {rate:g}/s", tuple(out), None, seed)


def trace(path: Path, *, requests: int, speedup: float = 1.0, longest: int = 1 << 30, seed: int = 0) -> Workload:
    """Return the first `requests` of a trace: Mooncake JSON lines or Azure LLM CSV; requests share their first block as the trace says.

    Args:
        path: the trace.
        requests: how many of it.
        speedup: 2 sends it twice as fast.
        longest: prompts and outputs are cut to that many tokens.
        seed: of the prompts' words.

    Raises:
        InvalidArgumentError: not a trace of either kind.
        OSError: it cannot be read.
    """
    from sagellm_control_plane.sim.traces import read_trace

    rows = read_trace(path)[:requests]
    first = rows[0].at
    arrivals = tuple(
        Arrival(
            (row.at - first) / speedup,
            min(row.prompt_tokens, longest),
            min(row.output_tokens, longest),
            int.from_bytes(row.blocks[0], "big") if row.blocks else 0,
            min(row.block_tokens, longest) if row.blocks else 0,
        )
        for row in rows
    )
    return Workload(f"trace {path.name} ×{speedup:g}", arrivals, None, seed)


def prompt_of(arrival: Arrival, index: int, seed: int, words_per_token: float = 1.0) -> str:
    """Return a text of about `arrival.prompt_tokens` tokens: common words, one token each in most vocabularies.

    The shared beginning depends on `arrival.prefix` alone, the rest on `index`: two prompts are never the same.
    `words_per_token` adapts to vocabularies where a word is not one token.
    """
    whole = max(1, round(arrival.prompt_tokens * words_per_token))
    shared = round(min(arrival.shared_tokens, arrival.prompt_tokens) * words_per_token)
    beginning = _words(random.Random(f"{seed}/prefix/{arrival.prefix}"), shared)  # noqa: S311 - a workload, not a secret
    own = _words(random.Random(f"{seed}/{index}"), whole - shared)  # noqa: S311
    return " ".join([*beginning, *own])


def _words(draw: random.Random, count: int) -> Sequence[str]:
    return draw.choices(_WORDS, k=max(0, count))
