"""One contender's turn in a round: which processes it starts, and what they are asked."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import contenders
from contenders import LeftOut, LineProcess, Server
from huggingface import write_folder
from load import run_streams
from rows import ROWS

from sagellm_core.loader import open_model

VOCABULARY = range(1000, 40_000)
PREFIX_TOKENS = 16  # of the answer: the first ones may be no text, and no event, of some servers
PREFIX_TRIES = 5


class Job(NamedTuple):
    """A part of the benchmark on this machine."""

    model: str
    threads: int
    rows: frozenset[str]


Burst = Callable[[list[list[int]], int], dict]
Numbers = dict[str, float]


def prompts(rng: random.Random, count: int, length: int) -> list[list[int]]:
    """Random prompts: no two share a prefix."""
    return [[rng.choice(VOCABULARY) for _ in range(length)] for _ in range(count)]


def turn(name: str, job: Job, rng: random.Random) -> Numbers:
    """Return row -> number of one contender, for the rows that it can give.

    Raises:
        LeftOut: it cannot run this model.
    """
    out: Numbers = {}
    for streams in sorted({ROWS[row].streams for row in job.rows}):
        options = {"model": job.model, "streams": streams, "threads": job.threads, "ctx": 2304 if streams == 1 else 512}
        out |= _ours(options, job, rng, streams) if name == "isagellm" else _peer(name, options, job, rng, streams)
    return {row: value for row, value in out.items() if row in job.rows or row.endswith("_limit")}


def _ours(options: dict, job: Job, rng: random.Random, streams: int) -> Numbers:
    out: Numbers = {}
    if streams == 1 and job.rows & {"decode", "prefill512", "prefill2048"}:
        session = contenders.our_session(options)
        try:
            out |= _single(session, rng, job.rows) | _limits(session, job.model)
        finally:
            session.close()
    if streams == 1 and not job.rows & {"http1", "prefix", "ready", "first_token"}:
        return out
    server = contenders.our_server(options["model"], streams, options["threads"], options["ctx"])
    try:
        out["ready"] = server.ready_s
        if streams == 1:
            first = run_streams(server.url, "bench", prompts(rng, 1, 32), 2)
            out["first_token"] = server.ready_s + first["ttft_s"][0]
        out |= _over_http(server, rng, streams, job.rows)
    finally:
        server.close()
    if streams > 1:
        del out["ready"]  # the row is that of a server for one
    return out


def _peer(name: str, options: dict, job: Job, rng: random.Random, streams: int) -> Numbers:
    session = contenders.peer_session(name, options)
    out: Numbers = {}
    try:
        if streams == 1:
            out |= _single(session, rng, job.rows)
            out["ready"] = session.ready["load_s"]
        if session.url:
            out |= _over_http(session, rng, streams, job.rows)
        elif streams > 1:
            out |= _many(lambda p, n: session.ask(op="many", prompts=p, n=n), rng, streams, job.rows)
            out |= _memory(session.pid, streams)
    finally:
        session.close()
    if streams == 1 and not session.url and "prefix" in job.rows:
        session = contenders.peer_session(name, {**options, "prefix_cache": True})
        try:
            out["prefix"] = _prefix(lambda p, n: session.ask(op="many", prompts=p, n=n), rng)
        finally:
            session.close()
    return out


class Vllm:
    """vLLM's server over all rounds: it takes a minute to start, so it starts once and is paused while others have their turn."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.model).with_suffix(".hf")
        if not (folder / "config.json").exists():
            write_folder(Path(job.model), folder)
        self.server = contenders.vllm_server(str(folder), job.threads, 512)
        print(f"vllm: ready after {self.server.ready_s:.0f} s", flush=True)
        self.rows = job.rows
        self.server.pause(True)

    def turn(self, rng: random.Random) -> Numbers:
        """Return row -> number, over HTTP."""
        self.server.pause(False)
        out: Numbers = {}
        for streams in sorted({ROWS[row].streams for row in self.rows}):
            out |= _over_http(self.server, rng, streams, self.rows)
        self.server.pause(True)
        return {row: value for row, value in out.items() if row in self.rows}

    def close(self) -> None:
        """End it."""
        self.server.pause(False)
        self.server.close()


def _over_http(server: Server | LineProcess, rng: random.Random, streams: int, rows: frozenset[str]) -> Numbers:
    def burst(prompts: list[list[int]], n: int, *, reuse: bool = False) -> dict:
        return run_streams(server.url, "bench", prompts, n, reuse=reuse)

    if streams > 1:
        return _many(burst, rng, streams, rows) | _memory(server.pid, streams)
    out: Numbers = {}
    if "http1" in rows:
        burst(prompts(rng, 1, 32), 8)
        answer = burst(prompts(rng, 1, 32), 128)
        out["http1"] = answer["tokens"] / answer["total_s"]
    if "prefix" in rows:
        out["prefix"] = _prefix(lambda p, n: burst(p, n, reuse=True), rng)
    return out


def _single(session: LineProcess, rng: random.Random, rows: frozenset[str]) -> Numbers:
    """Rows of one request at a time, in process; a first request warms up."""
    session.ask(op="one", prompt=prompts(rng, 1, 32)[0], n=8)
    out: Numbers = {}
    if "decode" in rows:
        answer = session.ask(op="one", prompt=prompts(rng, 1, 32)[0], n=129)
        out["decode"] = (answer["tokens"] - 1) / answer["decode_s"]
    for n in (512, 2048):
        if f"prefill{n}" in rows:
            answer = session.ask(op="one", prompt=prompts(rng, 1, n)[0], n=2)
            out[f"prefill{n}"] = n / answer["prefill_s"]
    return out


def _many(burst: Burst, rng: random.Random, streams: int, rows: frozenset[str]) -> Numbers:
    """Rows of many requests at once; a short burst warms up."""
    burst(prompts(rng, streams, 32), 8)
    out: Numbers = {}
    if rows & {f"streams{streams}", f"ttft{streams}", f"rss{streams}", f"pss{streams}"}:
        answer = burst(prompts(rng, streams, 32), 128)
        out[f"streams{streams}"] = answer["tokens"] / answer["total_s"]
        out[f"ttft{streams}"] = 1e3 * statistics.mean(answer["ttft_s"])
    if f"streams{streams}_p256" in rows:
        answer = burst(prompts(rng, streams, 256), 128)
        out[f"streams{streams}_p256"] = answer["tokens"] / answer["total_s"]
    return out


def _prefix(burst: Burst, rng: random.Random) -> float:
    """Milliseconds to the first token of a request whose first 512 tokens an earlier one had; 16 more are its own."""
    times = []
    for _ in range(PREFIX_TRIES):
        shared = prompts(rng, 1, 512)[0]
        burst([shared + prompts(rng, 1, 16)[0]], PREFIX_TOKENS)
        times.append(burst([shared + prompts(rng, 1, 16)[0]], PREFIX_TOKENS)["ttft_s"][0])
    return 1e3 * statistics.median(times)


def _memory(pid: int, streams: int) -> Numbers:
    held = contenders.memory_of(pid)
    return {f"rss{streams}": held.rss, f"pss{streams}": held.pss}


def _limits(session: LineProcess, model: str) -> Numbers:
    """What the machine allows, measured right after our own rows: tokens a second of decoding and of prefill."""
    limits = session.ask(op="limits")
    with open_model(model) as files:
        shapes = files.spec.slots().items()
        met = sum(math.prod(shape) for slot, shape in shapes if len(shape) > 1 and slot not in ("embed", "head"))
    return {
        "decode_limit": limits["read_bytes_per_s"] / session.ready["weight_bytes"],
        "prefill_limit": limits["int8_ops_per_s"] / (2 * met),
    }


__all__ = ["Job", "LeftOut", "Vllm", "turn"]
