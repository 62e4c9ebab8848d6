"""The backend passes the kit, on torch's CPU device and by plain torch operations; a GPU runs the same checks in benchmarks/cuda."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="torch is not installed: make test-cuda runs these in an environment of their own")

from sagellm_backend.conformance import CHECKS, Kit
from sagellm_backend.cuda import CudaBackend
from sagellm_backend.cuda.settings import CudaSettings
from sagellm_backend.tensors import Format

pytestmark = pytest.mark.cuda

ALL_FORMATS = (Format.F32, Format.F16, Format.BF16, Format.Q4_0, Format.Q4_1, Format.Q8_0)
EXACT = Kit(CudaBackend(CudaSettings(device="cpu", dtype="f32")), formats=ALL_FORMATS)
HALF = Kit(CudaBackend(CudaSettings(device="cpu", dtype="bf16")), tolerance=0.2, format_tolerance=0.2)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance_in_float32(check: Callable[[Kit], None]) -> None:
    """Every check holds in float32 within the kit's own tolerance."""
    check(EXACT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance_in_bfloat16(check: Callable[[Kit], None]) -> None:
    """Every check holds with activations and cache in bfloat16, at the precision that leaves."""
    check(HALF)
