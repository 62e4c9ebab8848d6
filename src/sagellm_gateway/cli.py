"""Arguments of ``python -m sagellm_gateway``."""

from __future__ import annotations

import argparse

from sagellm_gateway.config import GatewayConfig, Origins

__all__ = ["run"]


def run(argv: list[str] | None) -> int:
    """Parse `argv` and serve; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sagellm_gateway",
        description="Serve the HTTP gateway without an engine of its own: engines register over /v1/management. "
        "To serve a model use: sage-llm serve MODEL",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8889, help="port to listen on")
    parser.add_argument(
        "--state", default=None, metavar="FILE", help="SQLite file for keys, sessions and stored responses"
    )
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="further name that Host may hold"
    )
    parser.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="web origin that may call")
    args = parser.parse_args(argv)
    config = GatewayConfig(
        host=args.host,
        port=args.port,
        state_path=args.state,
        origins=Origins(hosts=tuple(args.allowed_host), cors=tuple(args.cors_origin)),
    )
    from sagellm_gateway.server import create_app, serve

    serve(create_app(config=config), config)
    return 0
