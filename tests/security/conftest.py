from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_core.local import LocalEngine
from sagellm_core.testing import mock_engine
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_gateway.config import GatewayConfig, Timeouts
from sagellm_gateway.server import create_app
from sagellm_gateway.testing import Running, running


def local_manager() -> ControlPlaneManager:
    """Return the real control plane; it adds an engine over the simulated device when it starts."""
    manager = ControlPlaneManager(mode="local")
    start = manager.start

    async def start_with_engine() -> None:
        await start()
        await manager.add_engine(LocalEngine(mock_engine()), ByteChatModel("mock", 2048))

    manager.start = start_with_engine  # type: ignore[method-assign]
    return manager


@pytest.fixture(scope="session")
def target() -> Iterator[Running]:
    """A gateway over the real stack, in this process: it must outlive the whole suite."""
    config = GatewayConfig(timeouts=Timeouts(header=2.0, body=2.0))
    with running(create_app(local_manager(), config)) as server:
        yield server


@pytest.fixture
def fresh() -> Iterator[Running]:
    """A gateway that a test may change."""
    with running(create_app(local_manager())) as server:
        yield server


@pytest.fixture
def attacker(target: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=target.url, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def server_is_fine(target: Running) -> Any:
    """After the test the same server answers a request within a second."""
    yield
    with httpx2.Client(base_url=target.url, timeout=1, trust_env=False) as client:
        body = {"model": "mock", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
