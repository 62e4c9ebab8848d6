"""The gateway with engines that are registered by hand."""

import os
import sys

from sage.llm.control_plane.manager import ControlPlaneManager
from sage.llm.control_plane.types import EngineState
from sage.llm.gateway.server import create_app


def build(engine_port: int):
    """Return the app over one registered engine."""
    manager = ControlPlaneManager(scheduling_policy="fifo", routing_strategy="least_loaded", mode="http")
    info = manager.register_engine("engine-1", "mock", "127.0.0.1", engine_port, engine_kind="llm")
    assert info.state in (EngineState.STARTING, EngineState.READY)
    return create_app(control_plane=manager)


def main() -> None:
    """Serve on the port that is given."""
    import uvicorn

    uvicorn.run(build(int(os.environ["ENGINE_PORT"])), host="127.0.0.1", port=int(sys.argv[1]), log_level="error")


if __name__ == "__main__":
    main()
