"""Engines for tests, ours and those of people who build on this package: the real stack over the simulated device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from sagellm_backend.adapter import Adapter
from sagellm_backend.base import LoadOptions
from sagellm_backend.mock import Latency, MockBackend, NextToken, mock_spec
from sagellm_backend.mock_script import Script, ScriptedTokens, ScriptRule, ScriptStep, ScriptTool, load_script
from sagellm_backend.tensors import EMPTY
from sagellm_core.engine import Engine, EngineSettings
from sagellm_core.request import GrammarCompiler
from sagellm_core.speculation import Speculator
from sagellm_core.spill import DiskTier
from sagellm_protocol.engine import EngineRequest, TokenDelta
from sagellm_protocol.errors import SageError

__all__ = [
    "Collected",
    "Script",
    "ScriptRule",
    "ScriptStep",
    "ScriptTool",
    "collect",
    "load_script",
    "mock_engine",
    "run_alone",
]


def mock_engine(
    *,
    n_blocks: int = 256,
    n_ctx: int = 2048,
    max_running: int = 16,
    max_rows: int = 256,
    max_logit_rows: int = 128,
    max_waiting: int = 4096,
    prefix_caching: bool = True,
    latency: Latency | None = None,
    next_token: NextToken | None = None,
    script: Script | None = None,
    clock: Callable[[], float] = time.monotonic,
    grammars: GrammarCompiler | None = None,
    speculator: Speculator | None = None,
    spill_dir: Path | None = None,
    spill_blocks: int = 64,
    engine_id: str = "mock",
) -> Engine:
    """Return an engine over the simulated device, at full speed unless `latency` is given.

    What it says is plain phrases, `next_token`, or a `script` (see `sagellm_backend.mock_script`).
    """
    if script is not None:
        next_token = ScriptedTokens(script, next_token)
    options = LoadOptions(n_blocks=n_blocks, max_rows=max_rows, max_logit_rows=max_logit_rows)
    runner = MockBackend(latency, next_token).load(mock_spec(n_ctx), EMPTY, options)
    spill = None if spill_dir is None else DiskTier(runner.kv, spill_dir, spill_blocks * runner.kv.block_bytes)
    settings = EngineSettings(
        engine_id=engine_id,
        model="mock",
        n_ctx=n_ctx,
        max_running=max_running,
        max_rows=max_rows,
        max_logit_rows=max_logit_rows,
        max_waiting=max_waiting,
        prefix_caching=prefix_caching,
        backend="mock",
        device="mock",
    )
    return Engine(runner, settings, clock=clock, grammars=grammars, speculator=speculator, spill=spill)


class Collected:
    """What one sequence gave, put together from its deltas."""

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []

    @property
    def token_ids(self) -> list[int]:
        """All tokens."""
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def logprobs(self) -> list[float]:
        """Log-probabilities of the tokens."""
        return [entry.logprob for delta in self.deltas for entry in delta.logprobs or ()]

    @property
    def text(self) -> str:
        """The bytes among the tokens as text."""
        return bytes(token for token in self.token_ids if token < 256).decode("utf-8", "replace")

    @property
    def finish_reason(self) -> str | None:
        """How it ended."""
        return self.deltas[-1].finish_reason if self.deltas else None

    @property
    def error(self) -> SageError | None:
        """Why it failed."""
        error = self.deltas[-1].error if self.deltas else None
        return None if error is None else SageError.from_wire(error)


def collect(engine: Engine, requests: Iterable[EngineRequest], *, max_steps: int = 100_000) -> dict[str, Collected]:
    """Run `requests` to their end and return what each gave, by id.

    Raises:
        RuntimeError: they did not end within `max_steps` steps.
    """
    out: dict[str, Collected] = {}
    for request in requests:
        engine.add(request)
        out[request.request_id] = Collected()
    for _ in range(max_steps):
        if not engine.has_work:
            return out
        for delta in engine.step():
            out.setdefault(delta.request_id, Collected()).deltas.append(delta)
    raise RuntimeError(f"still work to do after {max_steps} steps: {engine.status()}")


def run_alone(
    request: EngineRequest, adapters: Iterable[Adapter] = (), grammars: GrammarCompiler | None = None
) -> Collected:
    """Run one request on a fresh engine with room for everything and nothing that could change the result."""
    engine = mock_engine(prefix_caching=False, max_running=1, grammars=grammars)
    for adapter in adapters:
        engine.load_adapter(adapter)
    return collect(engine, [request])[request.request_id]
