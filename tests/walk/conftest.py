from __future__ import annotations

import socket

import pytest


@pytest.fixture
def port() -> int:
    """A port that is free now, for a server that starts on it again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
