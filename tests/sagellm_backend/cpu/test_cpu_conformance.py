"""The native backend passes the kit on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sagellm_backend.base import LoadOptions
from sagellm_backend.conformance import CHECKS, Kit
from sagellm_backend.cpu import CpuBackend
from sagellm_backend.cpu.backend import ISA_VARIABLE

_native = pytest.importorskip("sagellm_backend.cpu._native", reason="built without the extension")


OPTIONS = LoadOptions(n_blocks=64, max_rows=256, max_logit_rows=64, threads=2)
BF16 = Kit(CpuBackend(), tolerance=0.1, format_tolerance=0.3, options=OPTIONS)
INT8 = replace(BF16, tolerance=0.25, options=replace(OPTIONS, kv_dtype="int8"), formats=BF16.formats[:1])
EXACT = replace(BF16, tolerance=2e-3, options=replace(OPTIONS, kv_dtype="f32"), formats=())


@pytest.fixture(params=_native.supported_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("isa")
def test_conformance_with_bf16_cache(check: Callable[[Kit], None]) -> None:
    """Every check of the kit holds with the default cache."""
    check(BF16)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance_with_int8_cache(check: Callable[[Kit], None]) -> None:
    """Every check of the kit holds with a cache of 8 bits."""
    check(INT8)


@pytest.mark.parametrize("check", CHECKS[:2], ids=lambda check: check.__name__)
@pytest.mark.usefixtures("isa")
def test_float32_all_through_is_exact(check: Callable[[Kit], None]) -> None:
    """With float32 weights and a float32 cache the log-probabilities are the reference's."""
    check(EXACT)
