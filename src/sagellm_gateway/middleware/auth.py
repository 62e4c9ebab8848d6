"""Who calls, what the key's role covers, and whether its rate allows it: decided on ``scope["path"]``, denied by default."""

from __future__ import annotations

from sagellm_gateway.context import ANONYMOUS, Gateway, Message, Receive, Scope, Send
from sagellm_gateway.errors import HttpError
from sagellm_gateway.middleware.edge import refuse
from sagellm_gateway.routing import Router, shape_of
from sagellm_protocol.errors import PermissionDeniedError, SageError

__all__ = ["Auth"]


class Auth:
    """Stands before the router. Unknown paths need a key as well, so that a stranger learns nothing from a 404."""

    def __init__(self, app: Router, gateway: Gateway) -> None:
        self.router = app
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.router(scope, receive, send)
            return
        found = scope["sagellm.found"] = self.router.find(scope)
        role = "user" if isinstance(found, HttpError) else found[0].role
        principal = ANONYMOUS
        headers: list[tuple[bytes, bytes]] = []
        if role != "open":
            try:
                principal = await self.gateway.keyring.identify(scope)
                if principal.role not in ("admin", role):
                    raise PermissionDeniedError(f"the key's role is {principal.role}: this route needs {role}")
                if principal.key_id and scope["method"] == "POST":
                    headers = self.gateway.keyring.take(principal)
            except SageError as error:
                shape = shape_of(scope["path"]) if isinstance(found, HttpError) else found[0].shape
                scope["sagellm.outcome"] = error.code.value
                await refuse(error, scope, send, shape)
                return
        scope["sagellm.principal"] = principal
        await self.router(scope, receive, _with(headers, send) if headers else send)
        tokens = scope.get("sagellm.tokens")
        if tokens is not None and principal.key_id:
            self.gateway.keyring.used(principal, scope.get("sagellm.model", ""), *tokens)


def _with(headers: list[tuple[bytes, bytes]], send: Send) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *headers]
        await send(message)

    return answer
