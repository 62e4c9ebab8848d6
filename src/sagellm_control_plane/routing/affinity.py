"""A session stays with its engine, by rendezvous hashing; affinity never wins against a wait beyond the budget."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_control_plane.view import ClusterView, Decision, EngineView, RandomSource, RequestView

__all__ = ["choose"]


def weight(key: str, engine_id: str) -> int:
    """Rendezvous weight (Thaler and Ravishankar, 1998): stable between processes, unlike hash of a string."""
    value = 0xCBF29CE484222325
    for byte in f"{key}\0{engine_id}".encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    value ^= value >> 33
    value = (value * 0xFF51AFD7ED558CCD) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 33)


def choose(
    view: ClusterView, request: RequestView, candidates: Sequence[EngineView], now: float, rng: RandomSource
) -> Decision:
    """Return the session's engine; without a session the tenant's, and without a tenant the prompt's first block's."""
    key = request.session or request.tenant or (request.blocks[0].hex() if request.blocks else request.request_id)
    ranked = sorted(candidates, key=lambda e: weight(key, e.engine_id), reverse=True)
    fastest = min(engine.predicted_ttft(view.uncached(engine, request), now) for engine in ranked)
    budget = fastest + 0.5 * view.slo.ttft_s
    for engine in ranked:
        if engine.predicted_ttft(view.uncached(engine, request), now) <= budget:
            break
    return Decision(engine, view.hit_tokens(engine, request), 0.0, f"affinity of {key[:32]}")
