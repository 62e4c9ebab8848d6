"""llama.cpp (xllamacpp's prebuilt wheel): its own HTTP server, and single requests in process. Runs in the peer's environment.

Speaks the harness' line protocol: one JSON object a line on stdin and stdout (see contenders.py).
"""

import json
import sys
import time

import xllamacpp


def main() -> None:
    """Load, say so, answer commands until stdin ends."""
    options = json.loads(sys.argv[1])
    started = time.perf_counter()
    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.n_ctx = options["ctx"] * options["streams"]
    params.n_parallel = options["streams"]
    params.cpuparams.n_threads = options["threads"]
    params.cpuparams_batch.n_threads = options["threads"]
    params.n_gpu_layers = 0
    params.port = options.get("port", 0)
    params.warmup = False
    params.ui = False
    params.cache_ram_mib = 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    say(ready=True, load_s=time.perf_counter() - started, url=server.listening_address)
    for line in sys.stdin:
        command = json.loads(line)
        say(**complete(server, command["prompt"], command["n"]))


def complete(server: xllamacpp.Server, prompt: list[int], n: int) -> dict:
    """One greedy request; the server's own clock splits it into prefill and decode."""
    answer: list[dict] = []
    server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": n,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": False,
        },
        answer.append,
    )
    timings = answer[-1]["timings"]
    return {
        "prefill_s": timings["prompt_ms"] / 1e3,
        "decode_s": timings["predicted_ms"] / 1e3,
        "tokens": timings["predicted_n"],
    }


def say(**fields: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


main()
