"""Our gateway over engines at given ports: `python router_ours.py PORT ENGINE_PORT...`."""

from __future__ import annotations

import sys

from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.server import create_app, serve


def main() -> None:
    port, *engines = map(int, sys.argv[1:])
    manager = ControlPlaneManager()
    for number, engine in enumerate(engines):
        manager.register_engine(f"e{number}", "mock", "127.0.0.1", engine, metadata={"flavour": "vllm"})
    config = GatewayConfig(host="127.0.0.1", port=port)
    serve(create_app(manager, config), config)


if __name__ == "__main__":
    main()
