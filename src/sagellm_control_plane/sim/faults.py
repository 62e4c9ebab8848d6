"""Faults of simulated engines, and their notation for the command line."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Protocol

import msgspec

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Fault", "parse_faults"]


class _Engine(Protocol):
    slow: float


class _Cluster(Protocol):
    drop: float
    report_delay: float

    @property
    def engines(self) -> dict[str, _Engine]: ...

    def crash(self, engine_id: str, down_s: float | None) -> None: ...

    def stall(self, engine_id: str, duration_s: float) -> None: ...


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happens to an engine (or to all traffic) at a time.

    Attributes:
        kind: ``crash`` (value: seconds until it is back, 0 never), ``stall`` (value: seconds), ``slow`` (value: factor of every step),
            ``lossy`` (value: share of requests that do not arrive), ``late`` (value: seconds that load reports take).
        at: seconds of the simulation.
        engine: whom it happens to; not for ``lossy`` and ``late``.
        value: see `kind`.
    """

    kind: str
    at: float
    engine: str = ""
    value: float = 0.0

    def apply(self, cluster: _Cluster) -> None:
        """Let it happen."""
        _APPLY[self.kind](self, cluster)


def _crash(fault: Fault, cluster: _Cluster) -> None:
    cluster.crash(fault.engine, fault.value or None)


def _stall(fault: Fault, cluster: _Cluster) -> None:
    cluster.stall(fault.engine, fault.value)


def _slow(fault: Fault, cluster: _Cluster) -> None:
    cluster.engines[fault.engine].slow = fault.value


def _lossy(fault: Fault, cluster: _Cluster) -> None:
    cluster.drop = fault.value


def _late(fault: Fault, cluster: _Cluster) -> None:
    cluster.report_delay = fault.value


_APPLY: dict[str, Callable[[Fault, _Cluster], None]] = {
    "crash": _crash, "stall": _stall, "slow": _slow, "lossy": _lossy, "late": _late,
}  # fmt: skip


#: What a value may be; see `Fault.kind`.
_RANGES = {"crash": (0.0, 1e9), "stall": (1e-3, 1e9), "slow": (1e-3, 1e6), "lossy": (0.0, 1.0), "late": (0.0, 1e9)}


def parse_faults(text: str, engines: int) -> list[Fault]:
    """Read faults such as ``crash:e0@60=10,slow:e1@30=3,lossy@0=0.01`` of a cluster of so many engines.

    Raises:
        InvalidArgumentError: the text is not of that form, or a number means nothing; the message has the part at fault.
    """
    known = {f"e{i}" for i in range(engines)}
    faults = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        head, _, tail = part.partition("@")
        kind, _, engine = head.partition(":")
        at, _, value = tail.partition("=")
        wants_engine = kind in ("crash", "stall", "slow")
        try:
            numbers = float(at), float(value or 0.0)
        except ValueError:
            numbers = None
        if kind not in _APPLY or numbers is None or wants_engine != bool(engine):
            raise InvalidArgumentError(
                f"fault {part!r} is not understood: write kind[:engine]@seconds[=value], kinds are {', '.join(_APPLY)}",
                param="faults",
            )
        if engine and engine not in known:
            raise InvalidArgumentError(
                f"fault {part!r}: there is no {engine!r}, engines are e0 to e{engines - 1}", param="faults"
            )
        low, high = _RANGES[kind]
        if not 0.0 <= numbers[0] < inf or not low <= numbers[1] <= high:
            raise InvalidArgumentError(
                f"fault {part!r}: seconds are from 0 on, and the value of {kind!r} is from {low:g} to {high:g}",
                param="faults",
            )
        faults.append(Fault(kind=kind, at=numbers[0], engine=engine, value=numbers[1]))
    return faults
