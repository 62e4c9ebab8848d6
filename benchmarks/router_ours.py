"""Our gateway over engines at given ports, as its users start it: `python router_ours.py FOLDER WORKERS PORT ENGINE_PORT...`.

What ``sage-llm gateway --workers N --engine-file FILE`` does, with its state in FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sagellm.cli.main import main


def run() -> None:
    folder, workers, port, *engines = sys.argv[1:]
    rows = [
        {"engine_id": f"e{n}", "model_id": "mock", "host": "127.0.0.1", "port": int(engine), "metadata": {"flavour": "vllm"}}
        for n, engine in enumerate(engines)
    ]  # fmt: skip
    file = Path(folder) / f"engines-{port}.json"
    file.write_text(json.dumps({"engines": rows}), encoding="utf-8")
    state = ["--state", str(Path(folder) / f"state-{port}.sqlite")]
    sys.argv = ["sage-llm", "gateway", "--workers", workers, "--port", port, "--engine-file", str(file), *state]
    main()


if __name__ == "__main__":
    run()
