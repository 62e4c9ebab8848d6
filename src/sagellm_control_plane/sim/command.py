"""The program behind ``sage-llm simulate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sagellm_control_plane.config import SLO
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.faults import parse_faults
from sagellm_control_plane.sim.plot import goodput_svg
from sagellm_control_plane.sim.report import compare, table
from sagellm_control_plane.sim.traces import SimRequest, poisson, read_trace
from sagellm_protocol.errors import InvalidArgumentError, SageError

__all__ = ["main", "parser"]


_POLICIES = "round_robin,least_loaded,lmetric,predicted_latency,adaptive"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    out = argparse.ArgumentParser(
        prog="sage-llm simulate",
        description="Run a trace through the control plane's own policies and simulated engines.",
    )
    out.add_argument("--trace", type=Path, help="a Mooncake .jsonl or an Azure .csv; without it: Poisson arrivals")
    out.add_argument("--rate", type=float, default=4.0, help="requests a second without a trace [4]")
    out.add_argument("--requests", type=int, default=2000, help="requests without a trace [2000]")
    out.add_argument("--prompt-tokens", type=int, default=2000, help="mean prompt length without a trace [2000]")
    out.add_argument("--output-tokens", type=int, default=200, help="mean output length without a trace [200]")
    out.add_argument("--policy", default=_POLICIES, help=f"what is compared, several with commas [{_POLICIES}]")
    out.add_argument("--engines", type=int, default=8, help="simulated engines, all of one model [8]")
    out.add_argument("--speedup", default="1", help="how many times closer arrivals come, several with commas [1]")
    out.add_argument(
        "--faults", default="", help="kind[:engine]@seconds[=value], several with commas, engines are e0, e1, ..."
    )
    out.add_argument("--ttft", type=float, default=2.0, help="objective, seconds to the first token [2]")
    out.add_argument("--tpot", type=float, default=0.06, help="objective, seconds for each later token [0.06]")
    out.add_argument("--constants", type=Path, help="engine constants as JSON, as `sage-llm profile` writes them")
    out.add_argument("--seed", type=int, default=0, help="the same seed gives the same numbers [0]")
    out.add_argument("--json", type=Path, help="write all numbers there")
    out.add_argument("--plot", type=Path, help="write an SVG of goodput over load there")
    return out


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except OSError as error:
        sys.stderr.write(f"sage-llm simulate: {error.filename}: {error.strerror}\n")
    except SageError as error:
        sys.stderr.write(f"sage-llm simulate: {error}\n")
    return 1


def _check(options: argparse.Namespace) -> None:
    """Refuse what would only fail, or mean nothing, after the simulation."""
    for name in ("rate", "requests", "prompt_tokens", "output_tokens", "engines", "ttft", "tpot"):
        value = getattr(options, name)
        if not 0 < value < float("inf"):
            raise InvalidArgumentError(f"{name} is {value:g}: it must be a number above 0", param=name)
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidArgumentError(f"{path} cannot be written: there is no folder {path.parent}", param="output")


def _speeds(text: str) -> list[float]:
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        speeds = []
    if not speeds or not all(0.0 < speed < float("inf") for speed in speeds):
        raise InvalidArgumentError(f"speedup is {text!r}: write numbers above 0, e.g. 1,2,3", param="speedup")
    return speeds


def _constants(path: Path | None) -> EngineConstants:
    if path is None:
        return EngineConstants()
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineConstants)
    except msgspec.DecodeError as error:
        raise InvalidArgumentError(f"{path}: {error}", param="constants") from None


def _requests(options: argparse.Namespace) -> list[SimRequest]:
    if options.trace is not None:
        return read_trace(options.trace)
    return poisson(
        options.rate,
        options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        seed=options.seed,
    )


def _run(options: argparse.Namespace) -> int:
    _check(options)
    rows = []
    for row in compare(
        _requests(options),
        [name.strip() for name in options.policy.split(",")],
        _speeds(options.speedup),
        engines=options.engines,
        slo=SLO(ttft_s=options.ttft, tpot_s=options.tpot),
        constants=_constants(options.constants),
        seed=options.seed,
        faults=parse_faults(options.faults, options.engines),
    ):
        rows.append(row)
        sys.stderr.write(
            f"{row.policy} {row.speed_up:g}x: goodput {row.goodput:.3f}, TTFT p50 {row.ttft_p50:.2f} s p99 {row.ttft_p99:.2f} s, "
            f"refused {row.refused}, failed {row.failed}, {row.placement_us:.0f} us a placement, {row.wall_s:.1f} s\n"
        )
    sys.stdout.write(table(rows) + "\n")
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    if options.plot is not None:
        options.plot.write_text(goodput_svg(rows), encoding="utf-8")
    return 0
