"""Structured output on a real model: random schemas, every answer an instance of its schema."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/structured_output.py"
    spec = importlib.util.spec_from_file_location("structured_output", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_random_schemas_give_valid_json(default_model_path: Path) -> None:
    """200 random schemas at temperature 1, sixteen at a time: all 200 answers are valid."""
    report = asyncio.run(_script().run(default_model_path, 200, seed=1))
    assert report.failures == []
    assert report.valid == 200


@pytest.mark.model
def test_random_schemas_give_valid_json(default_model_path: Path) -> None:
    """The same for a handful."""
    report = asyncio.run(_script().run(default_model_path, 4, seed=2))
    assert report.failures == []
