"""The gateway's routes for calls from the same process: no web framework, no lifespan, no socket."""

from __future__ import annotations

from typing import Any

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.context import Gateway
from sagellm_gateway.library import ModelLibrary
from sagellm_gateway.middleware.edge import Edge
from sagellm_gateway.routes.table import ALIASED, ROUTES
from sagellm_gateway.routing import Router

__all__ = ["application"]


def application(manager: Any, config: GatewayConfig | None = None, library: ModelLibrary | None = None) -> Edge:
    """Return an ASGI application over `manager`, which the caller starts and stops."""
    gateway = Gateway(manager, config or GatewayConfig(access_log=False), library)
    gateway.ready = True
    return Edge(Router(gateway, ROUTES, aliased=ALIASED), gateway)
