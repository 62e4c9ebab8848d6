"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = ("test_cpu_kernels.py", "test_cpu_runner.py", "../../sagellm_core/text/test_mapped.py")
NATIVE = Path(__file__).parents[3] / "src/sagellm_backend/cpu/native"

SCRIPT = """
import importlib.util, os, sys
from dataclasses import replace

import pytest

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

bpe = load("sagellm_core.text._bpe", sys.argv[2])  # before anybody imports the installed one
import sagellm_core.text.mapped
assert sagellm_core.text.mapped._bpe is bpe
import sagellm_backend
module = load("sagellm_backend.cpu._native", sys.argv[1])
import sagellm_backend.cpu
sagellm_backend.cpu._native = module

from sagellm_backend.base import LoadOptions
from sagellm_backend.conformance import CHECKS, Kit, forward_matches_reference, long_context_matches_reference
from sagellm_backend.cpu import CpuBackend

assert pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[3:]]) == 0
for isa in module.supported_isas():
    os.environ["SAGELLM_CPU_ISA"] = isa
    options = LoadOptions(n_blocks=64, max_rows=256, max_logit_rows=64, threads=3)
    kit = Kit(CpuBackend(), tolerance=0.25, format_tolerance=0.4, options=options)
    for check in CHECKS if isa == module.supported_isas()[0] else (forward_matches_reference, long_context_matches_reference):
        check(kit)
    for kv in ("int8", "f32"):
        long_context_matches_reference(replace(kit, options=replace(options, kv_dtype=kv)))
    print(isa, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_no_bad_access_and_no_undefined_behaviour(tmp_path: Path) -> None:
    """Kernels on random shapes and whole steps run clean with the sanitizers on, on every instruction set and cache precision.

    Adapters and experts are among both; the kit's checks of other matters run on one instruction set.
    """
    compiler, cmake = shutil.which("g++"), shutil.which("cmake")
    if compiler is None or cmake is None:
        pytest.skip("needs g++ and cmake")
    out, build = tmp_path / "out", tmp_path / "build"
    options = ["-DSAGE_SANITIZE=ON", f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}"]
    subprocess.run([cmake, "-S", str(NATIVE), "-B", str(build), *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(build), "--parallel", "2"], check=True, capture_output=True)
    (module,), (bpe,) = out.glob("_native*.so"), out.glob("_bpe*.so")
    runtime = [
        subprocess.check_output([compiler, f"-print-file-name={lib}.so"], text=True).strip()
        for lib in ("libasan", "libubsan")
    ]
    libstdcxx = subprocess.check_output([compiler, "-print-file-name=libstdc++.so.6"], text=True).strip()
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join([*runtime, libstdcxx]),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(module), str(bpe), *(str(Path(__file__).parent / name) for name in TESTS)],
        check=False,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
