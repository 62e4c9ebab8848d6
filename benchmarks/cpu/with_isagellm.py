"""isagellm in process, through the engine that `sage-llm serve` runs.

Speaks the harness' line protocol: one JSON object a line on stdin and stdout (see contenders.py).
"""

import json
import sys
import time


def main() -> None:
    """Load, say so, answer commands until stdin ends."""
    options = json.loads(sys.argv[1])
    started = time.perf_counter()
    from sagellm_core.build import build_engine
    from sagellm_core.config import CacheOptions, DeviceOptions, EngineConfig, Limits

    engine = build_engine(
        EngineConfig(
            model=options["model"],
            backend="cpu",
            limits=Limits(n_ctx=options["ctx"], parallel=max(2, options["streams"])),
            device=DeviceOptions(threads=options["threads"]),
            cache=CacheOptions(prefix_caching=bool(options.get("prefix_cache"))),
        )
    )
    say(ready=True, load_s=time.perf_counter() - started, weight_bytes=engine.describe().weight_bytes)
    for number, line in enumerate(sys.stdin):
        command = json.loads(line)
        if command["op"] == "limits":
            from sagellm_backend.cpu.limits import measure_limits

            limits = measure_limits(options["threads"])
            say(read_bytes_per_s=limits.read_bytes_per_s, int8_ops_per_s=limits.int8_ops_per_s)
        else:
            say(**run(engine, number, command.get("prompts") or [command["prompt"]], command["n"]))


def run(engine, number: int, prompts: list[list[int]], n: int) -> dict:
    """Greedy requests added at once; times to first tokens and to the end."""
    from sagellm_protocol.engine import EngineRequest
    from sagellm_protocol.sampling import SamplingParams

    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, seed=0)
        engine.add(EngineRequest(request_id=f"{number}-{i}", prompt_token_ids=tuple(prompt), sampling=sampling))
    first: dict[str, float] = {}
    tokens = 0
    while engine.has_work:
        for delta in engine.step():
            if delta.error is not None:
                raise SystemExit(delta.error.message)
            tokens += len(delta.token_ids)
            if delta.token_ids:
                first.setdefault(delta.request_id, time.perf_counter() - began)
    total = time.perf_counter() - began
    ttft = sorted(first.values())
    return {"prefill_s": ttft[0], "decode_s": total - ttft[0], "tokens": tokens, "total_s": total, "ttft_s": ttft}


def say(**fields: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


main()
