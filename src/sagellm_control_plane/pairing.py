"""Prefill on one engine, decode on another: which pair, and whether it is worth it.

After DistServe (Zhong et al., OSDI 2024) and Splitwise (Patel et al., ISCA 2024): a prefill slows every sequence that decodes on
its engine, so that engines of their own for it keep the pace of tokens even, at the price of moving the KV blocks. Both halves are
chosen together, by the sum of the request's own delays and of those that it causes; where one engine alone is predicted to be
better, the request goes unsplit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sagellm_control_plane.types import PDSeparationConfig
from sagellm_control_plane.view import ClusterView, Decision, EngineView, RequestView

__all__ = ["choose", "roles"]

Choose = Callable[[Sequence[EngineView]], Decision]


def roles(engines: Sequence[EngineView], pd: PDSeparationConfig) -> tuple[set[str], set[str]]:
    """Return the ids of the engines that take prefill, and of those that decode.

    Roles that were given count; an engine of role ``any`` has both. If nobody has a role, the first of the engines by id take prefill,
    as many as `pd.prefill_engines` says, at least one and never all. A single engine has both.
    """
    if any(engine.profile.role != "any" for engine in engines):
        prefill = {e.engine_id for e in engines if e.profile.role in ("prefill", "any")}
        return prefill, {e.engine_id for e in engines if e.profile.role in ("decode", "any")}
    ids = sorted(engine.engine_id for engine in engines)
    if len(ids) < 2:
        return set(ids), set(ids)
    count = min(max(round(pd.prefill_engines * len(ids)), 1), len(ids) - 1)
    return set(ids[:count]), set(ids[count:])


def choose(
    view: ClusterView,
    request: RequestView,
    candidates: Sequence[EngineView],
    now: float,
    pd: PDSeparationConfig,
    expected_output: float,
    route: Choose,
) -> Decision:
    """Return the engine that decodes, with the one that prefills in `Decision.prefill`, or None there if it is the same.

    `route` is the routing strategy in force; it decides where a request goes unsplit: to any engine that was not set apart for prefill,
    and to those as well when no other has room.
    """
    prefill_ids, decode_ids = roles(view.ready[request.model], pd)
    whole = route([engine for engine in candidates if engine.profile.role != "prefill"] or candidates)
    decoders = [engine for engine in candidates if engine.engine_id in decode_ids]
    tokens = request.prompt_tokens + request.emitted
    uncached = tokens - whole.hit_tokens
    prefillers = [engine for engine in candidates if engine.engine_id in prefill_ids]
    if uncached < pd.min_prompt_tokens or not prefillers or not decoders or request.journal != "tokens":
        return whole
    hits = [view.hit_tokens(engine, request) for engine in prefillers]
    costs = [_prefill_cost(e, tokens - hit, now) for e, hit in zip(prefillers, hits, strict=True)]
    best = min(range(len(prefillers)), key=costs.__getitem__)
    decoder = min(decoders, key=lambda e: _decode_cost(e, tokens, expected_output))
    first = prefillers[best]
    if first is decoder:
        return whole
    transfer = tokens * pd.kv_bytes_per_token / pd.transfer_bytes_per_s
    split = costs[best] + transfer + _decode_cost(decoder, tokens, expected_output)
    alone = _prefill_cost(whole.engine, uncached, now) + _decode_cost(whole.engine, tokens, expected_output)
    wait = first.predicted_ttft(tokens - hits[best], now)
    late = wait > view.slo.ttft_s and wait > whole.engine.predicted_ttft(uncached, now)
    if split >= alone or late:
        return whole
    reason = f"split: {split * 1000:.0f} ms against {alone * 1000:.0f} ms on {whole.engine.engine_id} alone"
    return Decision(decoder, hits[best], split, reason, first)


def _prefill_cost(engine: EngineView, uncached: int, now: float) -> float:
    """Seconds until the first token, and the seconds by which that prefill delays those that decode there, together."""
    return engine.predicted_ttft(uncached, now) + engine.decoding * uncached / engine.latency.prefill_rate


def _decode_cost(engine: EngineView, tokens: int, expected_output: float) -> float:
    """Seconds of all later tokens."""
    return engine.predicted_tpot(1, tokens) * expected_output
