"""The ARM kernels, cross-compiled and run by an emulator: Debian's g++-aarch64-linux-gnu and qemu-user."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "src/sagellm_backend/cpu/native"
PLAIN = (
    "threads",
    "formats",
    "pack",
    "twin",
    "sample",
    "model",
    "forward",
    "head",
    "experts",
    "lora",
    "isa",
    "isa_portable",
)
FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{NATIVE}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_neon_kernels_equal_their_twins(tmp_path: Path) -> None:
    """On random shapes every NEON kernel agrees with its plain twin."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs an aarch64 cross compiler and qemu-user")
    objects = []
    for name in (*PLAIN, "isa_neon", "check_kernels"):
        source = Path(__file__).with_name(f"{name}.cpp") if name == "check_kernels" else NATIVE / f"{name}.cpp"
        objects.append(str(tmp_path / f"{name}.o"))
        march = ["-march=armv8.2-a+dotprod"] if name == "isa_neon" else []
        subprocess.run([compiler, *FLAGS, *march, "-c", str(source), "-o", objects[-1]], check=True)
    program = tmp_path / "check_kernels"
    subprocess.run([compiler, "-static", *objects, "-lpthread", "-o", str(program)], check=True)
    done = subprocess.run([emulator, "-cpu", "max", str(program), "40"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["neon", "portable"]
