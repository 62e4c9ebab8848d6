"""Each engine in turn."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the next engine of the model's rotation."""
    engine = candidates[view.next_turn(request.model, len(candidates))]
    return Decision(engine, view.hit_tokens(engine, request), 0.0, "next in turn")
