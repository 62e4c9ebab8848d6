"""Ten minutes of random load and aborts on one engine: RSS slope, and blocks held at the end.

    python benchmarks/soak_engine.py --model PATH --seconds 600

Prints one JSON object. Exits 1 if a block or a sequence is still held at the end, or if memory grows by more than
``--max-slope`` MiB a minute in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time

from sagellm_core.build import build_engine
from sagellm_core.config import CacheOptions, EngineConfig, Limits, MockOptions, SpeculationOptions
from sagellm_core.local import LocalEngine
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.errors import Error
from sagellm_protocol.sampling import GrammarSpec, SamplingParams


def request_of(number: int, rng: random.Random, vocab: int, prefixes: list[tuple[int, ...]]) -> EngineRequest:
    prompt = (*rng.choice(prefixes), *(rng.randrange(3, vocab) for _ in range(rng.randint(1, 200))))
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.2]),
        seed=number,
        max_tokens=rng.randint(1, 120),
        logprobs=rng.choice([None, None, 3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.1]),
        ignore_eos=rng.random() < 0.5,
        grammar=grammar_of(number, rng) if rng.random() < 0.2 else None,
    )
    return EngineRequest(
        request_id=f"soak-{number}",
        prompt_token_ids=prompt,
        sampling=sampling,
        eos_token_ids=(0, 2),
        priority=rng.randint(0, 4),
        deadline_s=rng.choice([None, None, None, rng.uniform(0.01, 5.0)]),
    )


def grammar_of(number: int, rng: random.Random) -> GrammarSpec:
    """One of a few dozen, or one that is wrong: so few that their cache is full before the slope of memory is taken."""
    number %= 16
    return rng.choice(
        [
            GrammarSpec(kind="json_object"),
            GrammarSpec(kind="choice", source='["yes", "no", "perhaps not"]'),
            GrammarSpec(kind="regex", source=f"([a-z]+ )*{number}"),
            GrammarSpec(kind="json_schema", source=json.dumps({"type": "array", "items": {"const": f"item {number}"}})),
            GrammarSpec(kind="regex", source="(never closed"),
        ]
    )


async def visit(engine: LocalEngine, request: EngineRequest, rng: random.Random, tally: dict[str, int]) -> None:
    """Read one stream to its end, or leave it after a random number of deltas."""
    patience = rng.randint(0, 60) if rng.random() < 0.4 else 1 << 30
    error: Error | None = None
    stream = engine.stream(request)
    try:
        async for delta in stream:
            tally["tokens"] += len(delta.token_ids)
            error = delta.error
            patience -= 1
            if patience <= 0:
                break
    finally:
        await stream.aclose()
    how = "left early" if patience <= 0 else f"failed: {error.code.value}" if error else "finished"
    tally[how] = tally.get(how, 0) + 1


async def soak(engine: LocalEngine, args: argparse.Namespace) -> dict[str, object]:
    rng = random.Random(args.seed)
    vocab = (await engine.describe()).vocab_size
    prefixes = [tuple(rng.randrange(3, vocab) for _ in range(n)) for n in (0, 16, 100, 256)]
    tally = {"tokens": 0, "finished": 0, "left early": 0}
    samples: list[tuple[float, int]] = []
    tasks: set[asyncio.Task[None]] = set()
    number, began = 0, time.monotonic()
    while (elapsed := time.monotonic() - began) < args.seconds:
        while len(tasks) < rng.randint(1, args.streams):
            number += 1
            task = asyncio.create_task(visit(engine, request_of(number, rng, vocab, prefixes), rng, tally))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if not samples or elapsed - samples[-1][0] >= 1.0:
            samples.append((elapsed, (await engine.status()).rss_bytes))
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    while (status := await engine.status()).running or status.waiting:  # noqa: ASYNC110  an engine tells by being asked
        await asyncio.sleep(0.01)
    await engine.check_integrity()
    second_half = [(at, rss) for at, rss in samples if at >= args.seconds / 2]
    return {
        "seconds": args.seconds,
        "requests": number,
        **tally,
        "preemptions": status.preemptions,
        "evictions": status.evictions,
        "spill_hits": status.spill_hits,
        "prefix_hit_rate": round(status.prefix_hits / max(1, status.prefix_queries), 3),
        "blocks_held_at_end": status.blocks_used,
        "rss_mib_first": samples[0][1] >> 20,
        "rss_mib_last": samples[-1][1] >> 20,
        "rss_slope_mib_per_minute": round(slope(second_half) * 60 / (1 << 20), 3),
    }


def slope(samples: list[tuple[float, int]]) -> float:
    """Least squares, bytes a second."""
    n = len(samples)
    mean_x, mean_y = sum(x for x, _ in samples) / n, sum(y for _, y in samples) / n
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


async def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as spill:
        config = EngineConfig(
            model=args.model,
            limits=Limits(n_ctx=640, parallel=12, max_batch_tokens=256),
            cache=CacheOptions(kv_bytes=args.kv_mib << 20, spill_dir=spill, spill_bytes=256 << 20),
            speculation=SpeculationOptions(method="ngram"),
            mock=MockOptions(scale=0.2),
        )
        engine = LocalEngine(build_engine(config))
        report = await soak(engine, args)
        await engine.close()
    print(json.dumps(report, indent=2))
    leaked = report["blocks_held_at_end"] != 0
    grows = float(str(report["rss_slope_mib_per_minute"])) > args.max_slope
    return 1 if leaked or grows else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mock")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--kv-mib", type=int, default=64)
    parser.add_argument("--max-slope", type=float, default=1.0, help="MiB a minute")
    parser.add_argument("--seed", type=int, default=0)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
