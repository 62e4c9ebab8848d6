"""Routing strategies: which of the candidates takes a request. One small file each, pure."""

from __future__ import annotations

from sagellm_control_plane.routing import (
    adaptive,
    affinity,
    consistent_hash,
    kv_aware,
    least_loaded,
    lmetric,
    locality,
    power_of_two,
    predicted_latency,
    random,
    round_robin,
    threshold_radix,
    topology_aware,
)
from sagellm_control_plane.view import Route
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["ROUTES", "route_named"]

ROUTES: dict[str, Route] = {
    "load_balanced": adaptive.choose,
    "round_robin": round_robin.choose,
    "random": random.choose,
    "least_loaded": least_loaded.choose,
    "power_of_two": power_of_two.choose,
    "affinity": affinity.choose,
    "locality": locality.choose,
    "topology_aware": topology_aware.choose,
    "kv_aware": kv_aware.choose,
    "predicted_latency": predicted_latency.choose,
    "lmetric": lmetric.choose,
    "threshold_radix": threshold_radix.choose,
    "consistent_hash": consistent_hash.choose,
}


def route_named(name: str) -> Route:
    """Return the strategy called `name`.

    Raises:
        InvalidArgumentError: there is none; the message lists them.
    """
    route = ROUTES.get(name)
    if route is None:
        raise InvalidArgumentError(
            f"routing strategy {name!r} is unknown: use one of {', '.join(sorted(ROUTES))}", param="routing_strategy"
        )
    return route
