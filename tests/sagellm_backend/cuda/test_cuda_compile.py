"""Triton's compiler takes every kernel, for chips that are not here: down to machine code, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: make test-cuda")
pytest.importorskip("triton", reason="triton is not installed: make test-cuda")

pytestmark = pytest.mark.cuda

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one block may have."""


def compiled(chip: int, *jobs: str) -> list[dict[str, object]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(chip), *jobs], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chip", SHARED)
def test_every_kernel_compiles_and_fits(chip: int) -> None:
    """Each kernel, in each precision, packing and tile, becomes machine code that fits the chip's shared memory."""
    kernels = compiled(chip)
    names = {str(kernel["kernel"]) for kernel in kernels}
    expected = {"_residual_norm", "_activate", "_rotate_and_store", "_embed", "_matmul", "_attend", "_join"}
    expected |= {"_follow", "_angles", "_vector", "_attend_row"}
    assert names == expected | {"_chunk_sums", "_pick", "_apply_masks"}
    assert all(int(str(kernel["cubin"])) > 0 for kernel in kernels)
    too_large = [kernel for kernel in kernels if int(str(kernel["shared"])) > SHARED[chip]]
    assert not too_large


def test_draws_are_compiled_without_fused_arithmetic() -> None:
    """The sampler's machine code multiplies and adds in two roundings, as its definition says."""
    kernels = compiled(90, "draws")
    assert len(kernels) == 3
    assert all(kernel["fused_f64"] == 0 for kernel in kernels)
