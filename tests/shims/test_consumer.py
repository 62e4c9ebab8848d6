"""The example consumer goes through warn, migrate and clean up."""

import subprocess
import sys
from pathlib import Path

PROVE = Path(__file__).resolve().parents[2] / "examples" / "consumer" / "prove.py"


def test_the_consumer_migrates():
    """On the shims it warns and works; migrated it is silent, prints the same, and the checker turns from red to green."""
    done = subprocess.run([sys.executable, str(PROVE)], capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all as promised\n")
