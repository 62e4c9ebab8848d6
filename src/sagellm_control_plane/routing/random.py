"""Any engine, uniformly."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return one of the candidates at random."""
    engine = candidates[rng.randrange(len(candidates))]
    return Decision(engine, view.hit_tokens(engine, request), 0.0, "random")
