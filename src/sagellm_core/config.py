"""How an engine is set up: one struct of small groups, the same in Python, in JSON and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from sagellm_protocol.errors import InvalidArgumentError

__all__ = [
    "CacheOptions",
    "DeviceOptions",
    "EngineConfig",
    "Limits",
    "MockOptions",
    "SchedulingOptions",
    "SpeculationOptions",
]

MOCK_MODEL = "mock"


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise InvalidArgumentError(f"{name} is {value}: it must be at least {low}", param=name)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of what an engine takes on.

    Attributes:
        n_ctx: tokens of one sequence, prompt and output; None is the model's own, at most 8192, less if memory is short.
        parallel: sequences that run at the same time.
        max_batch_tokens: rows of one step: the token budget that decode and prefill share.
        max_waiting: sequences that may queue; above that requests are refused as resource_exhausted.
    """

    n_ctx: int | None = None
    parallel: int = 16
    max_batch_tokens: int = 512
    max_waiting: int = 4096

    def __post_init__(self) -> None:
        for name in ("parallel", "max_batch_tokens", "max_waiting"):
            _at_least(name, getattr(self, name), 1)
        if self.n_ctx is not None:
            _at_least("n_ctx", self.n_ctx, 2)
        if self.max_batch_tokens <= self.parallel:
            raise InvalidArgumentError(
                f"max_batch_tokens is {self.max_batch_tokens} and parallel is {self.parallel}: every running sequence needs "
                f"a row and prefill at least one more: pass max_batch_tokens {self.parallel + 1} or more",
                param="max_batch_tokens",
            )


class DeviceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and in which precision the model runs.

    Attributes:
        threads: 0 is as many as the affinity mask and the cgroup quota allow.
        quant: precision of the weights; ``auto`` keeps the file's.
        kv_dtype: precision of the KV cache; ``auto`` is the backend's default.
        memory_bytes: bytes for weights, KV and scratch together; None is what is free on the device.
        cache_dir: where repacked weights are kept; None keeps none.
    """

    threads: int = 0
    quant: Literal["auto", "q4", "q8", "bf16", "f32"] = "auto"
    kv_dtype: Literal["auto", "f32", "bf16", "int8"] = "auto"
    memory_bytes: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _at_least("threads", self.threads, 0)
        if self.memory_bytes is not None:
            _at_least("memory_bytes", self.memory_bytes, 1)


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV cache.

    Attributes:
        prefix_caching: keep full blocks of ended sequences findable until their room is needed.
        kv_bytes: hard cap of the cache in bytes; None sizes it by `Limits` and what is free.
        spill_dir: directory for blocks that are evicted (``--kv-spill``); None drops them.
        spill_bytes: hard cap of that directory in bytes.
    """

    prefix_caching: bool = True
    kv_bytes: int | None = None
    spill_dir: str | None = None
    spill_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if self.kv_bytes is not None:
            _at_least("kv_bytes", self.kv_bytes, 1)
        _at_least("spill_bytes", self.spill_bytes, 1)


class SchedulingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who goes first.

    Attributes:
        ageing_s: seconds of age that count as much as one `Priority` band.
        max_failures: steps in a row that may fail before the engine declares itself dead.
    """

    ageing_s: float = 30.0
    max_failures: int = 3

    def __post_init__(self) -> None:
        _at_least("ageing_s", self.ageing_s, 0.001)
        _at_least("max_failures", self.max_failures, 1)


class SpeculationOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Guessing several tokens and checking them in one step; the output stays the same.

    Attributes:
        method: ``ngram`` looks the recent tokens up in prompt and output; ``draft`` asks a smaller model of the same vocabulary.
        draft_model: path of that model.
        max_draft: most tokens guessed at once; the actual number adapts to the acceptance rate.
        ngram_max, ngram_min: longest and shortest tail that is looked up.
    """

    method: Literal["none", "ngram", "draft"] = "none"
    draft_model: str | None = None
    max_draft: int = 6
    ngram_max: int = 4
    ngram_min: int = 2

    def __post_init__(self) -> None:
        _at_least("max_draft", self.max_draft, 1)
        _at_least("ngram_min", self.ngram_min, 1)
        _at_least("ngram_max", self.ngram_max, self.ngram_min)
        if (self.method == "draft") != (self.draft_model is not None):
            raise InvalidArgumentError(
                f"speculation method is {self.method!r} and draft_model is {self.draft_model!r}: the method 'draft' needs a "
                "draft_model and no other takes one",
                param="draft_model",
            )


class MockOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The simulated device: what a step costs, in simulated time.

    Attributes:
        base_ms: of every step.
        prefill_us: of each row of a prefill chunk.
        sequence_us: of each sequence of the step.
        scale: all of these are multiplied by it; 0 runs at full speed.
        script: file of scripted replies (see `sagellm_core.testing`).
    """

    base_ms: float = 4.0
    prefill_us: float = 60.0
    sequence_us: float = 150.0
    scale: float = 1.0
    script: str | None = None

    def __post_init__(self) -> None:
        for name in ("base_ms", "prefill_us", "sequence_us", "scale"):
            _at_least(name, getattr(self, name), 0.0)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine.

    Attributes:
        model: path of a model file or directory, or ``mock``.
        model_id: the name it is served under; empty is the file's stem.
        engine_id: unique in a control plane; empty is the model id.
        backend: name of a backend, or ``auto``. ``mock`` runs the model's real vocabulary size on the simulated device.
        adapters: LoRA adapters to load at start: name -> PEFT directory.
    """

    model: str
    model_id: str = ""
    engine_id: str = ""
    backend: str = "auto"
    limits: Limits = Limits()
    device: DeviceOptions = DeviceOptions()
    cache: CacheOptions = CacheOptions()
    scheduling: SchedulingOptions = SchedulingOptions()
    speculation: SpeculationOptions = SpeculationOptions()
    mock: MockOptions = MockOptions()
    adapters: dict[str, str] = {}

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidArgumentError("model is empty: give the path of a model, or 'mock'", param="model")

    @property
    def is_mock(self) -> bool:
        """Whether there is no model file at all."""
        return self.model == MOCK_MODEL

    @property
    def served_id(self) -> str:
        """The name the model is served under."""
        if self.model_id:
            return self.model_id
        return MOCK_MODEL if self.is_mock else Path(self.model).stem

    @property
    def name(self) -> str:
        """The engine's id."""
        return self.engine_id or self.served_id
