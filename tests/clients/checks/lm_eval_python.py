"""Run two tasks of lm-eval over HTTP: ``lm_eval_python.py ROOT_URL MODEL FOLDER``; prints what each sample gave as JSON."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

root, model, folder = sys.argv[1:]
tasks = TaskManager(include_path=folder, include_defaults=False)


def run(kind: str, path: str, task: str, **more: object) -> dict:
    arguments = {"model": model, "base_url": root + path, "num_concurrent": 4, "max_retries": 1, **more}
    chat = kind == "local-chat-completions"
    return simple_evaluate(
        kind, model_args=arguments, tasks=[task], task_manager=tasks, apply_chat_template=chat, bootstrap_iters=0
    )


found = {}
choices = run("local-completions", "/v1/completions", "choices", tokenizer_backend="remote")
found["acc"] = choices["results"]["choices"]["acc,none"]
samples = sorted(choices["samples"]["choices"], key=lambda s: s["doc_id"])
found["loglikelihoods"] = [[float(r[0][0]) for r in s["resps"]] for s in samples]
for name, kind, path in (
    ("completed", "local-completions", "/v1/completions"),
    ("answered", "local-chat-completions", "/v1/chat/completions"),
):
    answers = run(kind, path, "answers", **({"tokenizer_backend": "remote"} if name == "completed" else {}))
    found[name] = {
        "exact_match": answers["results"]["answers"]["exact_match,strip"],
        "texts": [s["resps"][0][0] for s in sorted(answers["samples"]["answers"], key=lambda s: s["doc_id"])],
    }
print(json.dumps(found))
