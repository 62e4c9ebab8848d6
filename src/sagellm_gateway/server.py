"""`create_app`: the gateway as an ASGI application; `serve` and `main`: the same under uvicorn."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from sagellm_gateway.config import GatewayConfig
from sagellm_gateway.context import Gateway
from sagellm_gateway.library import ModelLibrary
from sagellm_gateway.middleware.auth import Auth
from sagellm_gateway.middleware.edge import Edge
from sagellm_gateway.middleware.origin import OriginGuard
from sagellm_gateway.routes.table import ALIASED, ROUTES
from sagellm_gateway.routing import Router

if TYPE_CHECKING:
    from sagellm_control_plane.manager import ControlPlaneManager

__all__ = ["create_app", "main", "serve"]


def create_app(
    control_plane: ControlPlaneManager | None = None,
    config: GatewayConfig | None = None,
    *,
    library: ModelLibrary | None = None,
) -> Starlette:
    """Return a new gateway application.

    The application starts `control_plane` with its own lifespan and stops it at the end.

    Args:
        control_plane: what runs the requests; None makes an empty one, to which engines are registered over
            ``/v1/management``.
        config: settings; None takes the defaults.
        library: the models on disk, for the routes that pull and remove them.

    Returns:
        An ASGI application; ``app.state.gateway`` is its `Gateway`.
    """
    if control_plane is None:
        from sagellm_control_plane.manager import ControlPlaneManager

        control_plane = ControlPlaneManager()
    gateway = Gateway(control_plane, config or GatewayConfig(), library)
    app = _Application(lifespan=_lifespan)
    app.state.gateway = gateway
    app.router.default = Auth(Router(gateway, ROUTES, aliased=ALIASED), gateway)
    app.router.redirect_slashes = False
    app.add_middleware(OriginGuard, origins=gateway.config.origins)
    if gateway.config.tracing:
        from sagellm_gateway.middleware.tracing import Tracing

        app.add_middleware(Tracing)
    app.add_middleware(Edge, gateway=gateway, observers=(gateway.metrics.observe,))
    return app


class _Application(Starlette):
    """Starlette without what never acts here.

    `Endpoint` turns exceptions into answers, in the shape of each dialect; paths are looked up by our own `Router`. Starlette's router is
    asked for the lifespan, and for routes that somebody adds to the application.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Return what was added by `add_middleware`, around the router."""
        router = self.router

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and not router.routes:
                await router.default(scope, receive, send)
            else:
                await router(scope, receive, send)

        stack: ASGIApp = app
        for factory, args, kwargs in reversed(self.user_middleware):
            stack = factory(stack, *args, **kwargs)
        return stack


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    await _maybe_await(gateway.manager.start())
    await gateway.open()
    gateway.ready = True
    try:
        yield
    finally:
        gateway.ready = False
        gateway.drain()
        await gateway.close()
        await _maybe_await(gateway.manager.stop())


async def _maybe_await(value: Any) -> None:
    if inspect.isawaitable(value):
        await value


def serve(app: Starlette, config: GatewayConfig | None = None) -> None:
    """Serve `app` until SIGTERM or SIGINT; blocks.

    Raises:
        SystemExit: the address cannot be bound; the message says why.
    """
    from sagellm_gateway.uvicorn_server import run

    run(app, config or app.state.gateway.config)


def main(argv: list[str] | None = None) -> int:
    """Serve an empty control plane; engines register over HTTP. ``sage-llm serve`` is the way to serve a model."""
    from sagellm_gateway.cli import run

    return run(argv)
