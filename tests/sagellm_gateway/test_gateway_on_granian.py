from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_suite_passes_on_granian() -> None:
    """The gateway's tests and the security table pass with granian under the app instead of uvicorn."""
    pytest.importorskip("granian")
    paths = ["tests/sagellm_gateway", "tests/security/test_hostile_inputs.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *paths],
        cwd=ROOT,
        env={**os.environ, "SAGELLM_TEST_SERVER": "granian"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
