"""Where the gateway listens, and whether it may; imports no server, so that it can be settled first thing."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagellm_gateway.config import GatewayConfig
    from sagellm_gateway.context import Gateway

__all__ = ["bind", "refuse_open_door"]


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        SystemExit: the port is in use, or the address is not one of this machine; the message says which.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio's own loop sets TCP_NODELAY only where it sees it, and a token would wait 40 ms for an ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        sock.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise SystemExit(f"port {port} on {host} is in use: stop the other server or pass --port N") from None
        raise SystemExit(f"cannot listen on {host}:{port}: {error}") from None
    sock.setblocking(False)
    return sock


def refuse_open_door(gateway: Gateway, config: GatewayConfig) -> None:
    """Refuse to listen where the network reaches while anybody may call.

    Raises:
        SystemExit: the address is not a loopback one and there is no API key.
    """
    if config.host == "localhost" or config.require_key:
        return
    try:
        loopback = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not any(key.revoked is None for key in gateway.keys.all()):
        raise SystemExit(
            f"{config.host} can be reached from the network and no API key is set: make one with `sage-llm keys add NAME`, "
            "or listen on 127.0.0.1"
        )
