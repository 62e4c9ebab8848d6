"""Policies side by side: run, table, JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from sagellm_control_plane.config import SLO, AdmissionConfig, CoreConfig
from sagellm_control_plane.policies import POLICIES
from sagellm_control_plane.routing import ROUTES
from sagellm_control_plane.sim.cluster import SimResult, simulate
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.faults import Fault
from sagellm_control_plane.sim.traces import SimRequest, speed_up
from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["Row", "compare", "config_named", "table"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one load. Times in seconds; quantiles over the requests that had a first token."""

    policy: str
    speed_up: float
    requests: int
    goodput: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    refused: int
    failed: int
    moved: int
    hit_rate: float
    output_tps: float
    placement_us: float
    decision_us: float
    wall_s: float


def config_named(name: str, slo: SLO) -> CoreConfig:
    """Return the configuration that a policy's name stands for.

    A routing strategy stands for itself with nothing refused; a scheduling policy runs over adaptive routing with admission by the
    objective; ``adaptive`` is both.

    Raises:
        InvalidArgumentError: neither a routing strategy nor a scheduling policy.
    """
    open_door = AdmissionConfig(max_waiting=10**9)
    if name in POLICIES:
        return CoreConfig(scheduling_policy=name, slo=slo, admission=AdmissionConfig(max_waiting=10**9, slo=slo))
    if name in ROUTES:
        return CoreConfig(routing_strategy=name, slo=slo, admission=open_door)
    raise InvalidArgumentError(
        f"policy {name!r} is unknown: routing strategies are {', '.join(sorted(ROUTES))}, "
        f"scheduling policies are {', '.join(sorted(POLICIES))}",
        param="policy",
    )


def compare(
    requests: Sequence[SimRequest],
    policies: Sequence[str],
    speeds: Sequence[float],
    *,
    engines: int,
    slo: SLO,
    constants: EngineConstants,
    seed: int = 0,
    faults: Sequence[Fault] = (),
) -> Iterator[Row]:
    """Run every policy at every speed-up and yield a row for each."""
    for policy in policies:
        config = config_named(policy, slo)
        for factor in speeds:
            result = simulate(
                speed_up(requests, factor),
                config,
                engines=engines,
                constants=constants,
                seed=seed,
                faults=faults,
                measure=True,
            )
            yield _row(policy, factor, result, slo)


def _row(policy: str, factor: float, result: SimResult, slo: SLO) -> Row:
    stats = result.state.stats
    begun = [o for o in result.outcomes if o.first_at == o.first_at]
    ended = [o for o in begun if o.end_at == o.end_at]
    ttft = sorted(o.ttft for o in begun)
    tpot = sorted(o.tpot for o in ended)
    return Row(
        policy=policy,
        speed_up=factor,
        requests=len(result.outcomes),
        goodput=result.goodput(slo.ttft_s, slo.tpot_s),
        ttft_p50=_quantile(ttft, 0.5),
        ttft_p99=_quantile(ttft, 0.99),
        tpot_p50=_quantile(tpot, 0.5),
        tpot_p99=_quantile(tpot, 0.99),
        refused=sum(o.refused for o in result.outcomes),
        failed=sum(o.failed for o in result.outcomes),
        moved=sum(o.moves > 0 for o in result.outcomes),
        hit_rate=stats.hit_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
        output_tps=sum(o.output_tokens for o in ended) / result.simulated_s if result.simulated_s else 0.0,
        placement_us=result.placement_us,
        decision_us=result.decision_us,
        wall_s=result.wall_s,
    )


def _quantile(values: Sequence[float], q: float) -> float:
    return values[min(int(q * len(values)), len(values) - 1)] if values else float("nan")


def table(rows: Sequence[Row]) -> str:
    """Return goodput by policy and speed-up as text, the best of each column marked."""
    speeds = sorted({row.speed_up for row in rows})
    policies = list(dict.fromkeys(row.policy for row in rows))
    cells = {(row.policy, row.speed_up): row for row in rows}
    best = {speed: max(cells[p, speed].goodput for p in policies if (p, speed) in cells) for speed in speeds}
    width = max(len("policy"), *map(len, policies))
    lines = [f"{'policy':<{width}}" + "".join(f"{f'{speed:g}x':>9}" for speed in speeds)]
    for policy in policies:
        line = f"{policy:<{width}}"
        for speed in speeds:
            row = cells.get((policy, speed))
            mark = "*" if row is not None and row.goodput >= best[speed] else " "
            line += f"{row.goodput:>8.3f}{mark}" if row is not None else f"{'-':>8} "
        lines.append(line)
    return "\n".join(lines)
