"""The counting engine of `tests/sagellm_core/counting_engine.py`, and requests to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from sagellm_protocol import EngineRequest, SamplingParams

COUNTING = Path(__file__).parents[1] / "sagellm_core" / "counting_engine.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("counting_engine", COUNTING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CountingEngine = _load().CountingEngine


def request(last: int = 100, max_tokens: int = 5, request_id: str = "r") -> EngineRequest:
    """A request for `max_tokens` tokens after a prompt that ends with `last`."""
    return EngineRequest(
        request_id=request_id, prompt_token_ids=(50, last), sampling=SamplingParams(seed=1, max_tokens=max_tokens)
    )
