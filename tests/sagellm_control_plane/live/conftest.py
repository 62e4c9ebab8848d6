"""Directories and a store for a driver of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sagellm_control_plane.live.process_driver import ProcessOptions
from sagellm_control_plane.live.store import Store


@pytest.fixture
def options(tmp_path: Path) -> ProcessOptions:
    """Sockets and logs below the test's directory."""
    return ProcessOptions(run_dir=tmp_path / "run", log_dir=tmp_path / "logs")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in a file."""
    with closing(Store(tmp_path / "engines.sqlite")) as opened:
        yield opened
