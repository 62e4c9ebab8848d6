"""From a configuration to a running engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from sagellm_core.config import EngineConfig
from sagellm_core.plan import MemoryPlan, plan_memory
from sagellm_protocol.errors import InvalidArgumentError, ModelFileError, UnavailableError

if TYPE_CHECKING:
    from sagellm_backend.base import Backend, LoadOptions, Runner
    from sagellm_backend.spec import DecoderSpec
    from sagellm_backend.tensors import Weights
    from sagellm_core.engine import Engine
    from sagellm_core.request import GrammarCompiler
    from sagellm_core.speculation import Speculator
    from sagellm_core.text.tokenizer import TextTokenizer

__all__ = ["build_engine", "plan_engine"]


@dataclass(frozen=True, slots=True)
class _Model:
    """What is to be loaded."""

    spec: DecoderSpec
    weights: Weights
    quantization: str
    file_bytes: int


def plan_engine(config: EngineConfig) -> MemoryPlan:
    """Return the memory plan of an engine without loading it.

    Raises:
        ResourceExhaustedError: it does not fit.
        ModelFileError: the model cannot be read.
        UnavailableError: the backend cannot run here.
    """
    with _opened(config.model, config) as model:
        return _plan(config, model, _backend(config))


def build_engine(config: EngineConfig, *, clock: Callable[[], float] = monotonic) -> Engine:
    """Plan, load and assemble one engine.

    Raises:
        ResourceExhaustedError: it does not fit; the message has what is needed, what is free and the flag that makes it fit.
        ModelFileError: the model cannot be read.
        UnavailableError: the backend cannot run here.
        UnsupportedError: the backend lacks something that the model or the options need.
    """
    from sagellm_backend.overlap import LaunchRunner
    from sagellm_core.engine import Engine, EngineSettings
    from sagellm_core.overlap import OverlapEngine
    from sagellm_core.spill import DiskTier

    backend = _backend(config)
    with ExitStack() as undo, _opened(config.model, config) as model:
        plan = _plan(config, model, backend)
        runner = _load(_options(config, plan), backend, model)
        undo.callback(runner.close)
        speculator = _speculator(config, plan, backend, model.spec)
        if speculator is not None:
            undo.callback(speculator.close)
        spill = None
        if config.cache.spill_dir is not None:
            spill = DiskTier(runner.kv, config.cache.spill_dir, config.cache.spill_bytes)
        settings = EngineSettings(
            engine_id=config.name,
            model=config.served_id,
            n_ctx=plan.n_ctx,
            max_running=config.limits.parallel,
            max_rows=plan.max_rows,
            max_logit_rows=plan.max_logit_rows,
            max_waiting=config.limits.max_waiting,
            ageing_s=config.scheduling.ageing_s,
            max_failures=config.scheduling.max_failures,
            prefix_caching=config.cache.prefix_caching,
            backend=backend.name,
            device=backend.capability().device,
            quantization=model.quantization if config.device.quant == "auto" else config.device.quant,
            model_path="" if config.is_mock else config.model,
        )
        grammars = _grammars(config, model.spec)
        engine: Engine
        if speculator is None and isinstance(runner, LaunchRunner):
            engine = OverlapEngine(runner, settings, clock=clock, grammars=grammars, spill=spill)
        else:
            engine = Engine(runner, settings, clock=clock, grammars=grammars, speculator=speculator, spill=spill)
        undo.callback(engine.close)
        _load_adapters(config, engine)
        undo.pop_all()
        return engine


def _load_adapters(config: EngineConfig, engine: Engine) -> None:
    from sagellm_core.loader.adapter import open_adapter

    for name, path in config.adapters.items():
        engine.load_adapter(open_adapter(path, name, engine.spec))


def _backend(config: EngineConfig) -> Backend:
    from sagellm_backend.mock import Latency, MockBackend
    from sagellm_backend.mock_script import ScriptedTokens, load_script

    if config.is_mock and config.backend not in ("auto", "mock"):
        raise InvalidArgumentError(
            f"the model is 'mock' and the backend {config.backend!r}: a mock model runs on the mock device only",
            param="backend",
        )
    if config.mock.script is not None and not config.is_mock:
        raise InvalidArgumentError(
            f"a script is written in the mock model's bytes, the model is {config.served_id}: leave the model out",
            param="script",
        )
    if config.is_mock or config.backend == "mock":
        mock = config.mock
        return MockBackend(
            Latency(
                base=mock.base_ms * mock.scale / 1e3,
                prefill_row=mock.prefill_us * mock.scale / 1e6,
                sequence=mock.sequence_us * mock.scale / 1e6,
            ),
            ScriptedTokens(load_script(mock.script)) if mock.script is not None else None,
        )
    from sagellm_backend.auto import pick

    backend = pick(config.backend)
    reason = backend.available()
    if reason is not None:
        raise UnavailableError(f"backend {backend.name!r} cannot run here: {reason}")
    return backend


@contextmanager
def _opened(path: str, config: EngineConfig) -> Iterator[_Model]:
    """Yield the model at `path`; its files are closed afterwards (views that are in use keep them mapped)."""
    from sagellm_backend.mock import mock_spec
    from sagellm_backend.tensors import EMPTY

    if config.is_mock:
        yield _Model(mock_spec(max(8192, config.limits.n_ctx or 0)), EMPTY, "", 0)
        return
    from sagellm_core.loader import open_model

    with open_model(path) as files:
        yield _Model(files.spec, files.weights, files.quantization, files.file_bytes)


def _plan(config: EngineConfig, model: _Model, backend: Backend) -> MemoryPlan:
    if config.speculation.draft_model is None:
        return plan_memory(config, model.spec, model.file_bytes, backend)
    with _opened(config.speculation.draft_model, config) as draft:
        return plan_memory(config, model.spec, model.file_bytes, backend, (draft.spec, draft.file_bytes))


def _load(options: LoadOptions, backend: Backend, model: _Model) -> Runner:
    try:
        return backend.load(model.spec, model.weights, options)
    except ValueError as error:  # a backend's word for weights that do not match their spec
        raise ModelFileError(f"the model cannot be loaded: {error}") from error


def _options(config: EngineConfig, plan: MemoryPlan, more_rows: int = 0) -> LoadOptions:
    from sagellm_backend.base import LoadOptions

    return LoadOptions(
        n_blocks=plan.n_blocks,
        more_blocks=plan.more_blocks,
        max_rows=plan.max_rows + more_rows,
        max_logit_rows=plan.max_logit_rows,
        threads=config.device.threads,
        quant=config.device.quant,
        kv_dtype=config.device.kv_dtype,
        cache_dir=config.device.cache_dir,
    )


def _grammars(config: EngineConfig, spec: DecoderSpec) -> GrammarCompiler:
    """The tokenizer is loaded with the first grammar, so this costs nothing where none is used."""
    from sagellm_core.grammar import LLGuidanceCompiler

    def tokenizer() -> TextTokenizer:
        if config.is_mock:
            from sagellm_core.text.bytes_model import ByteChatModel

            return ByteChatModel(config.served_id, spec.context_length).tokenizer
        from sagellm_core.text.load import load_tokenizer

        return load_tokenizer(config.model)

    return LLGuidanceCompiler(tokenizer, spec.vocab_size)


def _speculator(config: EngineConfig, plan: MemoryPlan, backend: Backend, spec: DecoderSpec) -> Speculator | None:
    from sagellm_core.speculation import DraftSpeculator, NgramSpeculator

    options = config.speculation
    if options.method == "ngram":
        return NgramSpeculator(options.max_draft, options.ngram_max, options.ngram_min)
    if options.draft_model is None:
        return None
    with _opened(options.draft_model, config) as draft:
        if draft.spec.vocab_size != spec.vocab_size:
            raise InvalidArgumentError(
                f"the draft model has {draft.spec.vocab_size} tokens, the model {spec.vocab_size}: take one of the same family",
                param="draft_model",
            )
        return DraftSpeculator(_load(_options(config, plan, config.limits.parallel), backend, draft), options.max_draft)
