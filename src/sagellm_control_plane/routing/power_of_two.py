"""The less loaded of two engines drawn at random (Mitzenmacher, 2001)."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Draw two, keep the one with fewer open requests."""
    first = candidates[rng.randrange(len(candidates))]
    second = candidates[rng.randrange(len(candidates))]
    engine = second if second.load < first.load else first
    return Decision(engine, view.hit_tokens(engine, request), float(engine.load), "better of two")
