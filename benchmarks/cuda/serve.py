"""From process start to the first token, and the `openai` client against ``sage-llm serve --backend cuda``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench import Bench, Row

from sagellm_backend.spec import DecoderSpec

_FIRST_TOKEN = """
import sys, time
began = time.perf_counter()
from sagellm_core.build import build_engine
from sagellm_core.config import EngineConfig, Limits
from sagellm_core.testing import collect
from sagellm_protocol.engine import EngineRequest
from sagellm_protocol.sampling import SamplingParams
import torch
imported = time.perf_counter()
engine = build_engine(EngineConfig(model=sys.argv[1], backend="cuda", limits=Limits(n_ctx=512, parallel=16)))
built = time.perf_counter()
request = EngineRequest(request_id="a", prompt_token_ids=tuple(range(64)), sampling=SamplingParams(temperature=0.0, seed=0, max_tokens=1))
print(collect(engine, [request])["a"].token_ids, flush=True)
done = time.perf_counter()
print(f"stages: imports {imported - began:.1f} s, load and largest step {built - imported:.1f} s, first token {done - built:.1f} s")
"""


def write_qwen3(folder: Path, spec: DecoderSpec) -> None:
    """A model directory of the qwen3 family in bf16, with random weights."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    heads, kv, d, f = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim, spec.d_model, spec.d_ff
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, d), "model.norm.weight": (d,)}
    for layer in range(spec.n_layers):
        part = {
            "self_attn.q_proj": (heads, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, heads),
            "self_attn.q_norm": (spec.head_dim,),
            "self_attn.k_norm": (spec.head_dim,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in part.items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = rng.standard_normal(int(np.prod(shape)), dtype=np.float32) * 0.02 + (len(shape) == 1)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def start(bench: Bench) -> Iterator[Row]:
    """Process start to the first token of a 0.6B model whose file is in the page cache; the second start has compiled kernels."""
    with tempfile.TemporaryDirectory() as name:
        write_qwen3(Path(name), bench.sizes.small)
        for label in ("first", "second"):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-X", "importtime", "-c", _FIRST_TOKEN, name],
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.perf_counter() - began
            said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
            row: Row = {
                "work": f"process start to first token, 0.6B, {label} start",
                "value": f"{seconds:.1f} s; {_stages(done.stdout)}; {_imports(done.stderr)}",
                "ok": done.returncode == 0,
            }
            if done.returncode:
                row["value"] = (said[-1] if said else f"exit {done.returncode}")[:300]
                print("\n".join(said[-40:]), file=sys.stderr)
            elif label == "second":
                row |= {"ok": seconds <= 10.0, "goal": "10 s"}
            yield row


def _stages(text: str) -> str:
    """What the process said about its own times."""
    return next((line.removeprefix("stages: ") for line in text.splitlines() if line.startswith("stages: ")), "")


def _imports(text: str) -> str:
    """Seconds that the import of torch and of triton took, by ``-X importtime``."""
    found = []
    for line in text.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if len(fields) == 3 and fields[2].strip() in ("torch", "triton"):
            found.append(f"import {fields[2].strip()} {int(fields[1]) / 1e6:.1f} s")
    return ", ".join(found)


def serve(bench: Bench) -> Iterator[Row]:
    """Serve a real model and ask it with the official client, plain and streamed."""
    decoders = [path for path in bench.models if path.suffix == ".gguf"]
    if not decoders:
        yield {"work": "sage-llm serve --backend cuda", "value": "no model file was given (--model PATH)"}
    for model in decoders[:1]:
        with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
            argv = [sys.executable, "-m", "sagellm", "serve", str(model), "--backend", "cuda", "--port", "0"]
            process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                yield _ask(model, process, Path(log.name))
            finally:
                print(Path(log.name).read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait(20)


def _ask(model: Path, process: subprocess.Popen[bytes], log: Path) -> Row:
    from openai import OpenAI

    url = _address(process, log)
    client = OpenAI(base_url=url, api_key="none")
    name = client.models.list().data[0].id
    question = [{"role": "user", "content": "Name three colours."}]
    plain = client.chat.completions.create(model=name, messages=question, max_tokens=32, temperature=0)  # type: ignore[arg-type,call-overload]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(  # type: ignore[call-overload]
            model=name, messages=question, max_tokens=32, temperature=0, stream=True
        )
        if chunk.choices
    ]
    answer, streamed = plain.choices[0].message.content, "".join(pieces)
    value = f"{model.name} answered the openai client: {answer!r}; streamed {'the same' if answer == streamed else repr(streamed)}"
    return {"work": "sage-llm serve --backend cuda", "value": value, "ok": bool(answer) and answer == streamed}


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that the server prints when it is ready."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"http://127\.0\.0\.1:\d+/v1", text):
            return found[0]
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {text[-800:]}")
        time.sleep(0.1)
    raise RuntimeError(f"the server said no address in 120 s: {log.read_text()[-800:]}")
