"""What a scheduling policy is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sagellm_control_plane.view import ClusterView, EngineView, RequestView

__all__ = ["Policy", "all_candidates"]

Key = Callable[[RequestView], "tuple[float, ...]"]
Narrow = Callable[[ClusterView, RequestView, "Sequence[EngineView]", float], "Sequence[EngineView]"]


@dataclass(frozen=True)
class Policy:
    """A name, an order among waiting requests, and a narrowing of the engines offered to the routing strategy.

    Attributes:
        name: as users write it.
        key: the smallest goes next.
        banded: whether priority bands and tenants' fair shares stand above `key`.
        narrow: returns some of the candidates; none of them means that the request waits.
    """

    name: str
    key: Key
    banded: bool
    narrow: Narrow


def all_candidates(
    _view: ClusterView, _request: RequestView, candidates: Sequence[EngineView], _now: float
) -> Sequence[EngineView]:
    """Leave the choice to the routing strategy."""
    return candidates
