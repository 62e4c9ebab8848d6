"""Flags that set up an engine, shared by the commands that start one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from sagellm import store
from sagellm.cli.common import ProgressBar
from sagellm_protocol.errors import InvalidArgumentError

__all__ = [
    "Backend",
    "Ctx",
    "DraftModel",
    "KvBytes",
    "KvDtype",
    "Lora",
    "MaxBatchTokens",
    "Memory",
    "Mock",
    "MockSpeed",
    "NoPrefixCache",
    "Parallel",
    "Quant",
    "Script",
    "Spec",
    "Spill",
    "SpillBytes",
    "Threads",
    "bytes_of",
    "engine_changes",
    "ensure_model",
]

_SIZES, _DEVICE, _CACHE, _SPEC, _MOCK = "Sizes", "Device", "KV cache", "Speculation", "Mock"

Ctx = Annotated[
    int | None,
    typer.Option(
        "--ctx",
        min=2,
        help="Tokens of one sequence, prompt and output [the model's own, at most 8192].",
        rich_help_panel=_SIZES,
    ),
]
Parallel = Annotated[
    int | None,
    typer.Option("--parallel", min=1, help="Sequences that run at the same time [16].", rich_help_panel=_SIZES),
]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(
        "--max-batch-tokens", min=2, help="Rows of one step: decode and prefill together [512].", rich_help_panel=_SIZES
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", help="Cap of weights, KV and scratch together, such as 2GB [what is free].", rich_help_panel=_SIZES
    ),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", help="cpu, cuda, reference, mock, or an installed one [auto].", rich_help_panel=_DEVICE),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=0,
        help="CPU threads; 0 takes what the affinity mask and the quota allow [0].",
        rich_help_panel=_DEVICE,
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        "--quant", help="Precision of the weights: auto, q4, q8, bf16, f32 [auto: the file's].", rich_help_panel=_DEVICE
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option("--kv-dtype", help="Precision of the KV cache: auto, f32, bf16, int8 [auto].", rich_help_panel=_CACHE),
]
KvBytes = Annotated[
    str | None, typer.Option("--kv-size", help="Cap of the KV cache, such as 512MB.", rich_help_panel=_CACHE)
]
Spill = Annotated[
    Path | None,
    typer.Option(
        "--spill", "--kv-spill", help="Directory for KV blocks that are evicted [drop them].", rich_help_panel=_CACHE
    ),
]
SpillBytes = Annotated[
    str | None, typer.Option("--spill-size", help="Cap of that directory [4GB].", rich_help_panel=_CACHE)
]
NoPrefixCache = Annotated[
    bool, typer.Option("--no-prefix-cache", help="Forget the KV of ended requests at once.", rich_help_panel=_CACHE)
]
Spec = Annotated[
    str | None, typer.Option("--spec", help="Guess tokens ahead: none, ngram, draft [none].", rich_help_panel=_SPEC)
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model", help="Smaller model of the same vocabulary, for --spec draft.", rich_help_panel=_SPEC
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME=PATH",
        help="LoRA adapter (a PEFT directory), served under NAME; repeatable.",
        rich_help_panel=_DEVICE,
    ),
]
Mock = Annotated[
    bool,
    typer.Option(
        "--mock",
        help="Simulate the device: the real stack, no weights; with MODEL, its tokenizer and sizes.",
        rich_help_panel=_MOCK,
    ),
]
MockSpeed = Annotated[
    float | None,
    typer.Option(
        "--mock-scale", min=0.0, help="Multiply the simulated times; 0 runs at full speed [1].", rich_help_panel=_MOCK
    ),
]
Script = Annotated[
    Path | None, typer.Option("--script", help="Scripted replies for --mock (a file).", rich_help_panel=_MOCK)
]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([A-Za-z]*)")
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "kib": 2**10, "m": 10**6, "mb": 10**6, "mib": 2**20}
_UNITS |= {"g": 10**9, "gb": 10**9, "gib": 2**30}


def bytes_of(text: str, flag: str) -> int:
    """Return the bytes of ``512MB``, ``2GiB`` or ``1000``.

    Raises:
        InvalidArgumentError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise InvalidArgumentError(f"{flag} {text!r} is not a size: write 512MB, 2GiB or a number of bytes", param=flag)
    return int(float(match[1]) * unit)


def engine_changes(
    *,
    model: str = "",
    mock: bool = False,
    ctx: int | None = None,
    parallel: int | None = None,
    max_batch_tokens: int | None = None,
    memory: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    quant: str | None = None,
    kv_dtype: str | None = None,
    kv_bytes: str | None = None,
    spill: Path | None = None,
    spill_bytes: str | None = None,
    no_prefix_cache: bool = False,
    spec: str | None = None,
    draft_model: str | None = None,
    mock_scale: float | None = None,
    script: Path | None = None,
    lora: list[str] | None = None,
) -> dict[str, Any]:
    """Return the flags that were given as changes to an `EngineConfig`, group by group.

    With `mock` the device of `model` is simulated, unless that is the mock model, which has no other.

    Raises:
        InvalidArgumentError: a value that cannot be read, or a flag without the one that it belongs to.
        ModelNotFoundError: the draft model is not on this machine.
    """
    if mock and backend not in {None, "mock"}:
        raise InvalidArgumentError(
            f"--mock simulates the device, --backend {backend} does not: drop one", param="backend"
        )
    if mock and model != "mock":
        backend = "mock"
    for flag, given, owner, there in (
        ("--mock-scale", mock_scale, "--mock", mock or "mock" in {model, backend}),
        ("--script", script, "--mock", mock or "mock" in {model, backend}),
        ("--spill-size", spill_bytes, "--spill", spill is not None),
        ("--draft-model", draft_model, "--spec draft", spec in {None, "draft"}),
    ):
        if given is not None and not there:
            raise InvalidArgumentError(f"{flag} belongs to {owner}: pass that too, or drop it", param=flag[2:])
    _check_words({"--quant": quant, "--kv-dtype": kv_dtype, "--spec": spec})
    groups: dict[str, dict[str, Any]] = {}

    def put(group: str, name: str, value: Any) -> None:
        if value is not None:
            groups.setdefault(group, {})[name] = value

    put("limits", "n_ctx", ctx)
    put("limits", "parallel", parallel)
    put("limits", "max_batch_tokens", max_batch_tokens)
    put("device", "memory_bytes", bytes_of(memory, "--memory") if memory else None)
    put("device", "threads", threads)
    put("device", "quant", quant)
    put("device", "kv_dtype", kv_dtype)
    put("cache", "kv_bytes", bytes_of(kv_bytes, "--kv-size") if kv_bytes else None)
    put("cache", "spill_dir", str(spill.expanduser().resolve()) if spill else None)
    put("cache", "spill_bytes", bytes_of(spill_bytes, "--spill-size") if spill_bytes else None)
    put("cache", "prefix_caching", False if no_prefix_cache else None)
    put("speculation", "method", spec or ("draft" if draft_model else None))
    put("speculation", "draft_model", str(store.resolve(draft_model).path) if draft_model else None)
    put("mock", "scale", mock_scale)
    put("mock", "script", str(script.expanduser().resolve()) if script else None)
    changes: dict[str, Any] = dict(groups)
    if backend is not None:
        changes["backend"] = backend
    if lora:
        changes["adapters"] = dict(_adapter(text) for text in lora)
    return changes


def _check_words(given: dict[str, str | None]) -> None:
    """Refuse a word that the engine's configuration does not know, with those that it does."""
    from sagellm_core.config import DeviceOptions, SpeculationOptions

    fields = {
        "--quant": (DeviceOptions, "quant"),
        "--kv-dtype": (DeviceOptions, "kv_dtype"),
        "--spec": (SpeculationOptions, "method"),
    }
    for flag, word in given.items():
        kind, field = fields[flag]
        known = get_args(get_type_hints(kind)[field])
        if word is not None and word not in known:
            raise InvalidArgumentError(f"{flag} {word!r}: use one of {', '.join(known)}", param=flag[2:])


def _adapter(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise InvalidArgumentError(f"--lora {text!r}: write NAME=PATH, such as sql=./my-adapter", param="lora")
    return name, str(Path(path).expanduser().resolve())


def ensure_model(model: str) -> None:
    """Pull `model` if it is in the catalogue and not here yet; anything else is left to `store.resolve`."""
    if model == "mock" or store.layout.looks_like_path(model):
        return
    name = str(store.ModelName.parse(model))
    if name not in store.CATALOG or store.find(name) is not None:
        return
    from sagellm.store.pull import pull

    bar = ProgressBar()
    try:
        pull(name, progress=bar)
    finally:
        bar.finish()
