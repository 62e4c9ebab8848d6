"""Several gateway processes on one port: what one is told all do, what one is asked all answer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from sagellm_protocol.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_gateway.context import Gateway

__all__ = ["Peers", "duty"]


class Peers(Protocol):
    """The other processes that share the port."""

    async def ask(self, what: str, body: Any, lasting: str = "") -> list[Any]:
        """Have each of them do the duty `what`, and return their answers, plain data, in no order.

        One that ends or does not answer in time is left out.

        Args:
            what: name of a duty.
            body: plain data.
            lasting: a name under which it is kept, and repeated to processes that begin later; a new one takes an old one's place.
        """
        ...


def duty(gateway: Gateway, what: str, body: Any) -> Any:
    """Do in this process what it, or a peer, was asked; returns plain data.

    Raises:
        SageError: it cannot be done.
    """
    manager = gateway.manager
    match what:
        case "policy":
            _set_policy(manager, *body)
        case "drain":
            manager.start_engine_drain(body)
        case "register":
            return msgspec.to_builtins(manager.register_engine(*body))
        case "unregister":
            return msgspec.to_builtins(manager.unregister_engine(body))
        case "heartbeat":
            return msgspec.to_builtins(manager.record_engine_heartbeat(body))
        case "spent":
            gateway.keyring.spent_elsewhere(body)
        case "metrics":
            return gateway.metrics.families()
        case "state":
            in_flight = len(gateway.in_flight)
            return {
                "pid": os.getpid(), "in_flight": in_flight, "draining": gateway.draining, "ready": gateway.ready
            }  # fmt: skip
        case _:
            raise ValueError(f"{what!r} is not a duty")
    return None


def _set_policy(manager: Any, scheduling: str, routing: str) -> None:
    """Set both, or neither."""
    before = manager.get_status()["routing_strategy"]
    manager.update_routing(routing)
    try:
        manager.update_policy(scheduling)
    except InvalidArgumentError:
        manager.update_routing(before)
        raise
