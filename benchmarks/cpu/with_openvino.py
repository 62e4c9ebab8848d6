"""OpenVINO GenAI's continuous batching pipeline, in process, on the GGUF file. Runs in the peer's environment.

Speaks the harness' line protocol: one JSON object a line on stdin and stdout (see contenders.py).
"""

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    """Load, say so, answer commands until stdin ends."""
    options = json.loads(sys.argv[1])
    started = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = options["ctx"] * options["streams"] // 16
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = max(options["streams"], 16)
    scheduler.enable_prefix_caching = bool(options.get("prefix_cache"))
    pipe = genai.ContinuousBatchingPipeline(
        options["model"], scheduler, "CPU", {"INFERENCE_NUM_THREADS": options["threads"]}
    )
    say(ready=True, load_s=time.perf_counter() - started)
    for line in sys.stdin:
        command = json.loads(line)
        say(**run(pipe, command.get("prompts") or [command["prompt"]], command["n"]))


def run(pipe: genai.ContinuousBatchingPipeline, prompts: list[list[int]], n: int) -> dict:
    """Greedy requests added at once; times to first tokens and to the end."""
    config = genai.GenerationConfig()
    config.max_new_tokens = n
    config.min_new_tokens = n
    config.ignore_eos = True
    config.do_sample = False
    began = time.perf_counter()
    handles = [pipe.add_request(i, ov.Tensor(np.array([p], np.int64)), config) for i, p in enumerate(prompts)]
    first: dict[int, float] = {}
    tokens = 0
    while pipe.has_non_finished_requests():
        pipe.step()
        now = time.perf_counter()
        for i, handle in enumerate(handles):
            if handle.can_read():
                got = sum(len(output.generated_ids) for output in handle.read().values())
                tokens += got
                if got:
                    first.setdefault(i, now - began)
    total = time.perf_counter() - began
    return {
        "prefill_s": min(first.values()),
        "decode_s": total - min(first.values()),
        "tokens": tokens,
        "total_s": total,
        "ttft_s": sorted(first.values()),
    }


def say(**fields: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


main()
