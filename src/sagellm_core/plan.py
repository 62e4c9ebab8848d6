"""What an engine needs in memory, before anything is loaded: the same numbers for `sage-llm plan`, at start and in the refusal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from msgspec.structs import replace

from sagellm_core.config import EngineConfig
from sagellm_protocol.errors import ResourceExhaustedError

if TYPE_CHECKING:
    from sagellm_backend.base import Backend
    from sagellm_backend.spec import DecoderSpec

__all__ = ["MemoryPlan", "plan_memory"]

_Sized = tuple["DecoderSpec", int]
"""A model and the bytes of its file."""

DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 256
RUNTIME_BYTES = 64 << 20
"""The interpreter, numpy and the tokenizer."""
KV_SHARE = 0.5
"""Of what is free besides the weights, a cache that nobody sized takes at most this share."""
_WEIGHT_BITS = {"q4": 5.0, "q8": 9.0, "bf16": 16.0, "f32": 32.0}
_REPACKED = 1.15
"""Bytes of repacked weights over bytes in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes, and the sizes they follow from.

    Attributes:
        weight_bytes: weights as they will lie on the device, the draft model's with them.
        kv_bytes: all KV blocks, the draft model's with them.
        activation_bytes: of one step of `max_rows` rows.
        scratch_bytes: logits, and the runtime itself.
        free_bytes: what may be used: free on the device, or the cap that was given.
        n_ctx: tokens of one sequence.
        n_blocks, block_bytes: the KV cache; a block is one of the model and one of the draft model together.
        more_blocks: by how many the cache may grow where a backend measures what a step takes, instead of estimating it.
        max_rows, max_logit_rows: the step.
    """

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    scratch_bytes: int
    free_bytes: int
    n_ctx: int
    parallel: int
    n_blocks: int
    block_bytes: int
    max_rows: int
    max_logit_rows: int
    more_blocks: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.scratch_bytes

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.total_bytes <= self.free_bytes

    def render(self) -> str:
        """Return the plan as a table for people."""
        rows = [
            ("weights", self.weight_bytes, ""),
            ("KV cache", self.kv_bytes, f"{self.n_blocks} blocks of {self.block_bytes} bytes"),
            ("activations", self.activation_bytes, f"{self.max_rows} rows a step"),
            ("scratch", self.scratch_bytes, f"{self.max_logit_rows} logit rows and the runtime"),
            ("total", self.total_bytes, f"context {self.n_ctx}, up to {self.parallel} sequences at once"),
            ("free", self.free_bytes, "fits" if self.fits else "does not fit"),
        ]
        return "\n".join(f"{name:<12} {human(size):>10}  {note}".rstrip() for name, size, note in rows)


def plan_memory(
    config: EngineConfig,
    spec: DecoderSpec,
    file_bytes: int,
    backend: Backend,
    draft: tuple[DecoderSpec, int] | None = None,
) -> MemoryPlan:
    """Size an engine for `config`; `draft` is the spec and the file size of the draft model, if there is one.

    Without ``limits.n_ctx`` the context is the model's, at most 8192, or what fits. Without ``cache.kv_bytes`` the cache holds
    `parallel` full sequences, at most half of what is free besides the weights, and always at least one full sequence.

    Raises:
        ResourceExhaustedError: it does not fit; the message has what is needed, what is free and the flag that makes it fit.
    """
    models = [(spec, file_bytes)] if draft is None else [(spec, file_bytes), draft]
    plan, room = _sized(config, models, backend)
    if plan.kv_bytes > room:
        raise ResourceExhaustedError(_refusal(config, models, backend))
    return plan


def _sized(config: EngineConfig, models: Sequence[_Sized], backend: Backend) -> tuple[MemoryPlan, int]:
    """Return the sizes for `config` and the bytes that are left for KV; if those are fewer than the plan's, it does not fit."""
    from sagellm_backend.base import BLOCK_SIZE

    limits, (spec, _) = config.limits, models[0]
    drafts = config.speculation.max_draft if config.speculation.method != "none" else 0
    max_logit_rows = limits.parallel * (1 + drafts) + 16
    weights = sum(_weight_bytes(config, each, size, backend) for each, size in models)
    activations = sum(_activation_bytes(each, limits.max_batch_tokens) for each, _ in models)
    scratch = len(models) * max_logit_rows * spec.vocab_size * 4 + RUNTIME_BYTES
    free = backend.memory().free
    if config.device.memory_bytes is not None:
        free = min(free, config.device.memory_bytes)
    block_bytes = sum(backend.kv_block_bytes(each, config.device.kv_dtype) for each, _ in models)
    room = free - weights - activations - scratch
    if config.cache.kv_bytes is not None:
        room = min(room, config.cache.kv_bytes)
    n_ctx = _context(config, spec, max(0, room) // block_bytes * BLOCK_SIZE - BLOCK_SIZE)
    n_blocks = _blocks(config, n_ctx, max(0, room) // block_bytes, BLOCK_SIZE)
    plan = MemoryPlan(
        weight_bytes=weights,
        kv_bytes=n_blocks * block_bytes,
        activation_bytes=activations,
        scratch_bytes=scratch,
        free_bytes=free,
        n_ctx=n_ctx,
        parallel=limits.parallel,
        n_blocks=n_blocks,
        block_bytes=block_bytes,
        max_rows=limits.max_batch_tokens,
        max_logit_rows=max_logit_rows,
        more_blocks=_more_blocks(config, n_ctx, n_blocks, BLOCK_SIZE),
    )
    return plan, room


def _context(config: EngineConfig, spec: DecoderSpec, most: int) -> int:
    if config.limits.n_ctx is not None:
        return config.limits.n_ctx
    wanted = min(spec.context_length, DEFAULT_CONTEXT)
    return wanted if most >= wanted else max(min(wanted, LEAST_CONTEXT), most)


def _blocks(config: EngineConfig, n_ctx: int, most: int, block_size: int) -> int:
    """One full sequence and a block for a copy at least; `parallel` of them if there is room."""
    each = -(-n_ctx // block_size)
    share = most if config.cache.kv_bytes is not None else int(most * KV_SHARE)
    return max(each + 1, min(config.limits.parallel * each + 1, share))


def _more_blocks(config: EngineConfig, n_ctx: int, n_blocks: int, block_size: int) -> int:
    """What `parallel` full sequences lack. Whoever gave a size or a draft model, which shares the device, gets what was planned."""
    given = config.cache.kv_bytes is not None or config.device.memory_bytes is not None
    if given or config.speculation.draft_model is not None:
        return 0
    return max(0, config.limits.parallel * -(-n_ctx // block_size) + 1 - n_blocks)


def _weight_bytes(config: EngineConfig, spec: DecoderSpec, file_bytes: int, backend: Backend) -> int:
    formats = backend.capability().formats
    n_weights = sum(prod(shape) for shape in spec.slots().values())
    if backend.name == "mock":
        return 0
    if formats == ("f32",):
        return n_weights * 4
    if config.device.quant == "auto":
        return int(file_bytes * _REPACKED)
    return int(n_weights * _WEIGHT_BITS[config.device.quant] / 8)


def _activation_bytes(spec: DecoderSpec, rows: int) -> int:
    heads = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    return rows * (4 * spec.d_model + 2 * heads + 3 * spec.d_ff) * 4


def _refusal(config: EngineConfig, models: Sequence[_Sized], backend: Backend) -> str:
    plan, room = _sized(config, models, backend)
    fact = (
        f"the engine needs {human(plan.total_bytes)} (weights {human(plan.weight_bytes)}, KV {human(plan.kv_bytes)} for one "
        f"sequence of {plan.n_ctx} tokens, the rest {human(plan.activation_bytes + plan.scratch_bytes)})"
    )
    if config.cache.kv_bytes is not None and config.cache.kv_bytes == room:
        return f"{fact}, --kv-size allows {human(room)} for KV: pass --kv-size {plan.kv_bytes} or more"
    cures = [flag for flag, changed in _cheaper(config, models, backend) if _fits(changed, models, backend)]
    singles = [flag for flag in cures if flag.count("--") == 1]
    cure = f"pass {' or '.join(singles or cures[:1])}" if cures else "take a smaller model"
    return f"{fact}, {human(plan.free_bytes)} is free: {cure}"


def _fits(config: EngineConfig, models: Sequence[_Sized], backend: Backend) -> bool:
    plan, room = _sized(config, models, backend)
    return plan.kv_bytes <= room


def _cheaper(config: EngineConfig, models: Sequence[_Sized], backend: Backend) -> Iterator[tuple[str, EngineConfig]]:
    """Yield flags that ask for less memory, alone and then together, and the configuration with them."""
    flags: list[tuple[str, dict[str, str]]] = []
    if config.device.kv_dtype != "int8" and "int8" in backend.capability().kv_dtypes:
        flags.append(("--kv-dtype int8", {"kv_dtype": "int8"}))
    if config.device.quant != "q4" and "q4" in backend.capability().formats:
        flags.append(("--quant q4", {"quant": "q4"}))
    if len(flags) == 2:
        flags.append((f"{flags[0][0]} {flags[1][0]}", flags[0][1] | flags[1][1]))
    for flag, device in [("", {}), *flags]:
        changed = replace(config, device=replace(config.device, **device))
        n_ctx = _fitting(changed, models, backend)
        if flag:
            yield flag, changed
        if LEAST_CONTEXT <= n_ctx < (config.limits.n_ctx or 0):
            yield f"{flag} --ctx {n_ctx}".strip(), replace(changed, limits=replace(config.limits, n_ctx=n_ctx))


def _fitting(config: EngineConfig, models: Sequence[_Sized], backend: Backend) -> int:
    """Tokens of the longest context for which there is room, with a block for a copy."""
    from sagellm_backend.base import BLOCK_SIZE

    plan, room = _sized(config, models, backend)
    return max(0, room) // plan.block_bytes * BLOCK_SIZE - BLOCK_SIZE


def human(n_bytes: int) -> str:
    """Return a size for people, in binary units."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
