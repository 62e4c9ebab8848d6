"""From records to numbers, and numbers to text, JSON, CSV and SVG."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagellm.bench.runner import Record

__all__ = ["SLO", "percentile", "summarize", "table", "write"]

_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class SLO:
    """What counts as good, in seconds."""

    ttft_s: float = 2.0
    tpot_s: float = 0.06


def percentile(values: Sequence[float], q: float) -> float:
    """Return the q-th percentile by linear interpolation between closest ranks (NIST handbook 7.2.6.2, as numpy's default).

    `values` must not be empty; `q` lies in [0, 100].
    """
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _spread(values: Sequence[float], scale: float = 1000.0) -> dict[str, float]:
    if not values:
        return {}
    out = {f"p{q}": round(percentile(values, q) * scale, 3) for q in _PERCENTILES}
    return {"mean": round(sum(values) / len(values) * scale, 3), **out, "max": round(max(values) * scale, 3)}


def summarize(records: Sequence[Record], slo: SLO) -> dict[str, Any]:
    """Return the numbers of a run. Times are milliseconds; goodput counts failed requests as missed."""
    good = [r for r in records if r.ok]
    began = min((r.sent_s for r in records), default=0.0)
    span = max((r.end_s for r in records), default=0.0) - began
    kept = sum(r.ttft_s <= slo.ttft_s and r.tpot_s <= slo.tpot_s for r in good)
    output, prompt = sum(r.output_tokens for r in good), sum(r.prompt_tokens for r in good)
    per_second = (lambda count: round(count / span, 3)) if span > 0 else (lambda _count: 0.0)
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "error_rate": round((len(records) - len(good)) / len(records), 6) if records else 0.0,
        "errors": _by_code(records),
        "seconds": round(span, 3),
        "requests_per_s": per_second(len(good)),
        "output_tokens_per_s": per_second(output),
        "total_tokens_per_s": per_second(output + prompt),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_tokens": sum(r.cached_tokens for r in good),
        "ttft_ms": _spread([r.ttft_s for r in good]),
        "tpot_ms": _spread([r.tpot_s for r in good if r.output_tokens > 1]),
        "itl_ms": _spread([gap for r in good for gap in r.itl_s]),
        "e2e_ms": _spread([r.e2e_s for r in good]),
        "send_delay_ms": _spread([r.sent_s - r.due_s for r in records if r.due_s is not None]),
        "slo": {"ttft_ms": slo.ttft_s * 1000, "tpot_ms": slo.tpot_s * 1000},
        "goodput": round(kept / len(records), 6) if records else 0.0,
        "goodput_requests_per_s": per_second(kept),
    }


def _by_code(records: Sequence[Record]) -> dict[str, int]:
    out: dict[str, int] = {}
    for record in records:
        if not record.ok:
            code = record.error.partition(":")[0] or "empty_answer"
            out[code] = out.get(code, 0) + 1
    return out


def table(summary: dict[str, Any]) -> str:
    """Return the numbers as text."""
    lines = [
        f"requests     {summary['requests']} ({summary['failed']} failed) in {summary['seconds']} s",
        f"throughput   {summary['output_tokens_per_s']} output tokens/s, {summary['requests_per_s']} requests/s",
        f"goodput      {summary['goodput']:.1%} within TTFT {summary['slo']['ttft_ms']:g} ms, TPOT {summary['slo']['tpot_ms']:g} ms",
    ]
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    lines.append(f"{'ms':<12} " + " ".join(f"{name:>10}" for name in columns))
    lines += [
        f"{name[:-3].upper():<12} " + " ".join(f"{summary[name][c]:>10.2f}" for c in columns)
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
        if summary[name]
    ]
    lines += [f"error        {count} × {code}" for code, count in summary["errors"].items()]
    return "\n".join(lines)


def write(folder: Path, run: dict[str, Any], records: Sequence[Record]) -> None:
    """Write ``run.json``, ``requests.csv`` and ``plot.svg`` into `folder`."""
    from sagellm.bench.plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    with (folder / "requests.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            (
                "index",
                "sent_s",
                "ttft_ms",
                "tpot_ms",
                "e2e_ms",
                "prompt_tokens",
                "output_tokens",
                "finish_reason",
                "error",
            )
        )
        for r in records:
            times = (
                (f"{r.ttft_s * 1000:.3f}", f"{r.tpot_s * 1000:.3f}", f"{r.e2e_s * 1000:.3f}") if r.ok else ("", "", "")
            )
            out.writerow(
                (r.index, f"{r.sent_s:.6f}", *times, r.prompt_tokens, r.output_tokens, r.finish_reason, r.error)
            )
    (folder / "plot.svg").write_text(plot(run, records), encoding="utf-8")
