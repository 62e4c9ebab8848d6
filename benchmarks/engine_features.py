"""What the prefix cache and n-gram speculation are worth on one engine.

    python benchmarks/engine_features.py --model PATH

Prints one JSON object: time to first token of a prompt with a 512-token prefix, cold and with the prefix cached (median of
several), and decode speed with and without n-gram speculation on a repetitive and on a normal text, the two interleaved.
Speculation is verified here too: the tokens must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from sagellm_core.build import build_engine
from sagellm_core.config import EngineConfig, Limits, SpeculationOptions
from sagellm_core.engine import Engine
from sagellm_core.text import load_chat_model
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.generation import ChatMessage, GenerationRequest
from sagellm_protocol.sampling import SamplingParams

NORMAL = "Explain in simple words why the sky is blue and why sunsets are red."
REPETITIVE = "".join(
    f'{{"id": {100 + i}, "kind": "order", "customer": "c-{i % 3}", "status": "{("open", "paid")[i % 2]}", "total": {10 + i}}}\n'
    for i in range(10)
)


def first_token_s(engine: Engine, ids: tuple[int, ...], name: str) -> float:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=1)
    engine.add(EngineRequest(request_id=name, prompt_token_ids=ids, sampling=sampling))
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def prefix_ttft(engine: Engine, ids: list[int], prefix: int, rounds: int) -> dict[str, float]:
    """Time to first token with the prefix computed, and with it found."""
    cold, warm = [], []
    for turn in range(rounds):
        tail = (100 + turn, 200 + turn, 300, 400)
        engine.clear_cache()
        cold.append(first_token_s(engine, (*ids[:prefix], *tail), f"cold-{turn}"))
        warm.append(first_token_s(engine, (*ids[:prefix], 7, *tail), f"warm-{turn}"))
    a, b = statistics.median(cold), statistics.median(warm)
    return {"cold_ms": round(a * 1e3, 2), "hit_ms": round(b * 1e3, 2), "ratio": round(a / b, 1)}


def decode(engine: Engine, ids: tuple[int, ...], n: int, name: str) -> tuple[list[int], float, int]:
    """Return the tokens, the seconds after the first of them, and the steps."""
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=n, ignore_eos=True)
    engine.add(EngineRequest(request_id=name, prompt_token_ids=ids, sampling=sampling))
    tokens: list[int] = []
    began, steps = 0.0, 0
    while engine.has_work:
        for delta in engine.step():
            if not tokens:
                began = time.perf_counter()
            tokens += delta.token_ids
        steps += 1
    return tokens, time.perf_counter() - began, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    limits = Limits(n_ctx=1024, parallel=4)
    plain = build_engine(EngineConfig(model=args.model, limits=limits))
    guessing = build_engine(
        EngineConfig(model=args.model, limits=limits, speculation=SpeculationOptions(method="ngram"))
    )
    chat = load_chat_model(args.model, "model")
    ids = chat.tokenize((NORMAL + " ") * 60)
    report: dict[str, object] = {
        "prefix_tokens": args.prefix,
        "ttft": prefix_ttft(plain, ids, args.prefix, args.rounds),
    }
    question = GenerationRequest(
        request_id="q",
        model="model",
        messages=(ChatMessage(role="user", content=NORMAL),),
        sampling=SamplingParams(max_tokens=1),
    )
    prompts = {
        "repetitive": tuple(chat.tokenize(REPETITIVE)),
        "normal": chat.prepare(question).engine_requests[0].prompt_token_ids,
    }
    for label, prompt in prompts.items():
        ratios, speeds, steps = [], [], 0
        before = guessing.status()
        for turn in range(args.rounds):
            want, plain_s, _ = decode(plain, prompt, args.tokens, f"p{turn}")
            got, guessing_s, steps = decode(guessing, prompt, args.tokens, f"n{turn}")
            assert got == want, "speculation changed the output"
            ratios.append(plain_s / guessing_s)
            speeds.append((args.tokens - 1) / plain_s)
        after = guessing.status()
        guessed = after.draft_tokens - before.draft_tokens
        report[f"ngram_{label}"] = {
            "plain_tok_s": round(statistics.median(speeds), 1),
            "speedup": round(statistics.median(ratios), 2),
            "tokens_per_step": round(args.tokens / steps, 2),
            "acceptance": round((after.accepted_tokens - before.accepted_tokens) / guessed, 2) if guessed else None,
        }
    plain.close()
    guessing.close()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
