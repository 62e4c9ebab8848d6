"""Directories for a driver of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagellm_control_plane.live.process_driver import ProcessOptions


@pytest.fixture
def options(tmp_path: Path) -> ProcessOptions:
    """Sockets and logs below the test's directory."""
    return ProcessOptions(run_dir=tmp_path / "run", log_dir=tmp_path / "logs")
