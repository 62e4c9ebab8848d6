"""llama.cpp's log-probabilities of the likeliest tokens at many positions of a text. Runs in the peer's environment (see quality.py).

Reads {"model", "threads", "ids", "positions", "top"} from standard input; writes one JSON line a position: [[id, logprob], ...].
"""

import json
import sys

import xllamacpp


def main() -> None:
    """Answer one job."""
    job = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = len(job["ids"]) + 16
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.n_gpu_layers = 0
    params.port = 0
    params.warmup = False
    params.ui = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    for position in job["positions"]:
        answer: list[dict] = []
        server.handle_completions(
            {
                "prompt": job["ids"][: position + 1],
                "n_predict": 1,
                "temperature": 0,
                "n_probs": job["top"],
                "cache_prompt": True,
                "stream": False,
            },
            answer.append,
        )
        top = answer[-1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        sys.stdout.write(json.dumps([[entry["id"], entry["logprob"]] for entry in top]) + "\n")
        sys.stdout.flush()


main()
